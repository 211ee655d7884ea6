# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks need beside the library is the examples'."""

import benchmarks  # noqa: F401  # finds the examples

collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import matplotlib  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]
