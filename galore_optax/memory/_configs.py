# SPDX-License-Identifier: Apache-2.0
"""The model configurations that come with the library, as Hugging Face writes them."""

from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).with_name("configs")


def config_names() -> list[str]:
    """The names of the configurations in the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def config_path(name: str) -> Path:
    """Where the configuration `name` lies.

    Args:
      name: one of the package's, such as `"7b"`, or the path of a `config.json`.

    Returns:
      the path of a JSON file with Hugging Face's keys.

    Raises:
      FileNotFoundError: it is neither; the nearest name is offered.

    Example:
      >>> from galore_optax import memory
      >>> memory.config_path("7b").name
      '7b.json'
    """
    path = FOLDER / f"{name}.json"
    path = path if path.exists() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(_no_config(name))
    return path


def _no_config(name: str) -> str:
    near = get_close_matches(name, config_names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"no model {name!r}.{hint} Give one of {', '.join(config_names())}, or the path"
        " of a config.json."
    )
