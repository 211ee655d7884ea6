# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are no package; those of the LLaMA example need what it needs."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "llama")]
collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]
