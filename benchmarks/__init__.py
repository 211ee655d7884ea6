# SPDX-License-Identifier: Apache-2.0
"""What is measured, in rooms: speed, memory, training, why; `lib` is the machinery.

Run from the repository's root: `python -m benchmarks.speed.floor`.
"""

import sys
from pathlib import Path

_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# The benchmarks train with the examples, which are programs and no packages.
sys.path[:0] = [str(_EXAMPLES / name) for name in ("llama", "finetune", "vit")]
