# SPDX-License-Identifier: Apache-2.0
"""What this example takes from the LLaMA's, whose folder is found here alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.with_name("llama")))

from corpora import download as download
from data import cache_dir as cache_dir
