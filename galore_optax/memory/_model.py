# SPDX-License-Identifier: Apache-2.0
"""What is planned: the sizes of a LLaMA, its parameters, and how a step is run."""

import dataclasses
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.layerwise import Params

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
FORMED, NEVER = "formed", "never"
_FOLDER = Path(__file__).with_name("configs")
# Our field: the key of Hugging Face's config.json.
_KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "tied": "tie_word_embeddings",
}
_REQUIRED = ("vocab", "width", "hidden", "layers", "heads")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaMA: rotary grouped-query attention, SwiGLU, a head."""

    vocab: int
    width: int
    hidden: int  # of the MLP
    layers: int
    heads: int
    key_heads: int | None = None  # as many as heads if None
    head_size: int | None = None  # width / heads if None
    tied: bool = False  # the head's kernel is the embedding

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            if getattr(self, name) < 1:
                raise ValueError(f"{_KEYS[name]}={getattr(self, name)} must be >= 1.")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"hidden_size={self.width} is no multiple of"
                f" num_attention_heads={self.heads}. Give head_dim."
            )
        if self.heads % (self.key_heads or self.heads):
            raise ValueError(
                f"num_attention_heads={self.heads} is no multiple of"
                f" num_key_value_heads={self.key_heads}."
            )

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return (self.key_heads or self.heads) * self.head_dim

    @classmethod
    def load(cls, name: str) -> "Sizes":
        """The sizes of a model of the LLaMA family.

        Args:
          name: one of `config_names()`, or the path of a Hugging Face `config.json`.

        Raises:
          FileNotFoundError: there is neither; the nearest name is offered.
          ValueError: it is no JSON, a key is missing, or sizes do not divide.

        Example:
          >>> from galore_optax import memory
          >>> memory.Sizes.load("7b").layers
          32
        """
        path = config_path(name)
        return _from_hugging_face(_read(path), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # of decoding, too
        raise ValueError(
            f"{path} is no JSON ({error}). Give the config.json of a model."
        ) from error
    return found if isinstance(found, dict) else {}


def _from_hugging_face(found: dict[str, Any], path: Path) -> Sizes:
    other = "Pass the model's tree of shapes to galore_optax.memory.plan."
    missing = [_KEYS[field] for field in _REQUIRED if _KEYS[field] not in found]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is no LLaMA's config.json. {other}"
        )
    return Sizes(**{field: found[key] for field, key in _KEYS.items() if key in found})


def config_names() -> list[str]:
    """The names of the configurations in the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def config_path(name: str) -> Path:
    """Where the configuration `name` lies: a JSON file with Hugging Face's keys.

    Args:
      name: one of the package's, such as `"7b"`, or the path of a `config.json` or of
        a folder that holds one.

    Raises:
      FileNotFoundError: it is neither; the nearest name is offered.

    Example:
      >>> from galore_optax import memory
      >>> memory.config_path("7b").name
      '7b.json'
    """
    path = _FOLDER / f"{name}.json"
    path = path if path.exists() else Path(name)
    if (path / "config.json").is_file():  # a folder as transformers saves one
        return path / "config.json"
    if not path.is_file():
        near = get_close_matches(name, config_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"no model {name!r}.{hint} Give one of {', '.join(config_names())}, or the"
            " path of a config.json."
        )
    return path


def shapes(sizes: Sizes, dtype: Any = jnp.bfloat16) -> Params:
    """The parameters of a LLaMA as `jax.ShapeDtypeStruct`s.

    Args:
      sizes: of the model.
      dtype: of all weights.

    Returns:
      `Params` of nested dictionaries; kernels are (in, out), those of blocks (layers,
      in, out). A tied head has its norm only.

    Example:
      >>> from galore_optax import memory
      >>> memory.shapes(memory.Sizes.load("9m")).blocks["mlp"]["up"]["kernel"].shape
      (4, 128, 352)
    """
    d, f, q, k = sizes.width, sizes.hidden, sizes.query_width, sizes.key_width

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def stacked(**kernels: tuple[int, int]) -> Any:
        return {name: {"kernel": of(sizes.layers, *x)} for name, x in kernels.items()}

    blocks = {
        "attn_norm": {"scale": of(sizes.layers, d)},
        "attn": stacked(q=(d, q), k=(d, k), v=(d, k), o=(q, d)),
        "mlp_norm": {"scale": of(sizes.layers, d)},
        "mlp": stacked(gate=(d, f), up=(d, f), down=(f, d)),
    }
    kernel = {} if sizes.tied else {"kernel": of(d, sizes.vocab)}
    head = {"norm": {"scale": of(d)}} | kernel
    return Params({"embedding": of(sizes.vocab, d)}, blocks, head)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a training step is run.

    Args:
      tokens: of one sequence.
      batch: sequences of a micro-batch.
      accumulation: micro-batches whose gradients are added up for one update.
      dtype: of weights, gradients and activations.
      remat: blocks keep only their inputs and compute the rest again.
      layerwise: the update of a layer is made as soon as its gradient is there.
      gradients: "formed", or "never" as by `value_and_projected_grad`.
      refresh_shares: of that.

    Raises:
      ValueError: a count below one, an unknown dtype or kind of gradients, layerwise
        without gradients.

    Example:
      >>> from galore_optax import memory
      >>> memory.Setting(tokens=2048, remat=True).itemsize
      2
    """

    tokens: int = 256
    batch: int = 1
    accumulation: int = 1
    dtype: str = "bfloat16"
    remat: bool = False
    layerwise: bool = False
    gradients: str = FORMED
    refresh_shares: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "accumulation", "refresh_shares"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, known in (("dtype", DTYPES), ("gradients", (FORMED, NEVER))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown. Choose one of"
                    f" {', '.join(known)}."
                )
        if self.layerwise and self.never_formed:
            raise ValueError(
                "gradients=never with layerwise is not planned. Leave gradients out:"
                " such a step holds the same, but for the gradients of one layer."
            )

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def never_formed(self) -> bool:
        return self.gradients == NEVER

    @property
    def savings(self) -> tuple[str, ...]:
        """What it does for memory beside a plain step."""
        used = {
            "remat": self.remat,
            "layerwise": self.layerwise,
            "never formed": self.never_formed,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def __str__(self) -> str:
        parts = [f"{self.batch} x {self.tokens} tokens", self.dtype, *self.savings]
        if self.accumulation > 1:
            parts.insert(1, f"{self.accumulation} micro-batches")
        return ", ".join(parts)
