# SPDX-License-Identifier: Apache-2.0
"""What a training step holds in memory, before there is a device to run it on.

python -m galore_optax plan 7b --method adamw galore_adamw8bit --option rank=1024
"""

from galore_optax.memory._bytes import StateBytes as StateBytes
from galore_optax.memory._bytes import parse_size as parse_size
from galore_optax.memory._bytes import state_bytes as state_bytes
from galore_optax.memory._bytes import tree_bytes as tree_bytes
from galore_optax.memory._methods import Method as Method
from galore_optax.memory._methods import method_names as method_names
from galore_optax.memory._methods import option_names as option_names
from galore_optax.memory._methods import parse_options as parse_options
from galore_optax.memory._model import Setting as Setting
from galore_optax.memory._model import Sizes as Sizes
from galore_optax.memory._model import config_names as config_names
from galore_optax.memory._model import config_path as config_path
from galore_optax.memory._model import shapes as shapes
from galore_optax.memory._plan import Phase as Phase
from galore_optax.memory._plan import Plan as Plan
from galore_optax.memory._plan import plan as plan
from galore_optax.memory._search import Choice as Choice
from galore_optax.memory._search import NothingFits as NothingFits
from galore_optax.memory._search import search as search
from galore_optax.memory._show import against_adamw as against_adamw
from galore_optax.memory._show import draw as draw
from galore_optax.memory._show import notes as notes
from galore_optax.memory._show import table as table
