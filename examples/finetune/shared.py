# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning takes from the LLaMA example, whose folder is found here alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.with_name("llama")))

from adapters import adapt as adapt
from corpora import download as download
from data import cache_dir as cache_dir
from metrics import Log as Log
from model import parameter_count as parameter_count
from steps import state_bytes as state_bytes
