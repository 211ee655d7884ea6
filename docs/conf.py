# SPDX-License-Identifier: Apache-2.0
"""How `make docs` builds the site."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "galore_optax"
author = "the authors of galore_optax"
release = metadata.version("galore_optax")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "fit",
    "mathml",
]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"  # as docstrings use single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstring says what an argument is, and its shape
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Tabs of code show what to type, and neither prompts nor output.
copybutton_exclude = ".linenos, .gp, .go"

pygments_style = "default"
html_theme = "furo"
html_favicon = "_static/icon.svg"
html_title = "galore_optax"
html_static_path = ["_static", "../out/fit"]  # the latter by the extension fit
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
