# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are no package; what they need beside the library is the examples'."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "benchmarks", "examples/llama", "examples/finetune"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import matplotlib  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]
