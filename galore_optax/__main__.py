# SPDX-License-Identifier: Apache-2.0
"""python -m galore_optax plan ..."""

import sys

from galore_optax.memory._cli import main

if __name__ == "__main__":
    sys.exit(main())
