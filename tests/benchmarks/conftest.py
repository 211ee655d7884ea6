# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are scripts; what they need beside the library is the example's."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import matplotlib  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]
