# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are no package; they need what the examples need."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]
