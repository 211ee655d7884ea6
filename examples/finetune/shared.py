# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning takes from the LLaMA example, whose folder is found here alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.with_name("llama")))

from adapters import adapt as adapt  # noqa: E402
from corpora import download as download  # noqa: E402
from data import cache_dir as cache_dir  # noqa: E402
from metrics import Log as Log  # noqa: E402
from model import Linear as Linear  # noqa: E402
from model import parameter_count as parameter_count  # noqa: E402
from steps import state_bytes as state_bytes  # noqa: E402
