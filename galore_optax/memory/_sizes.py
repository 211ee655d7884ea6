# SPDX-License-Identifier: Apache-2.0
"""The sizes of a LLaMA, read from a Hugging Face `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from galore_optax.memory._configs import config_path

# Our field: the key of Hugging Face's config.json.
_KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
_REQUIRED = ("vocab", "width", "hidden", "layers", "heads")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaMA: rotary grouped-query attention, SwiGLU, an untied head."""

    vocab: int
    width: int
    hidden: int  # of the MLP
    layers: int
    heads: int
    key_heads: int | None = None  # as many as heads if None
    head_size: int | None = None  # width / heads if None
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            if getattr(self, name) < 1:
                raise ValueError(f"{_KEYS[name]}={getattr(self, name)} must be >= 1.")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"hidden_size={self.width} is no multiple of"
                f" num_attention_heads={self.heads}. Give head_dim."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary positions turn pairs."
            )
        if self.heads % self.groups:
            raise ValueError(
                f"num_attention_heads={self.heads} is no multiple of"
                f" num_key_value_heads={self.groups}."
            )

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.key_heads or self.heads

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.groups * self.head_dim

    @classmethod
    def load(cls, name: str) -> "Sizes":
        """The sizes of a model of the LLaMA family.

        Args:
          name: one of `config_names()`, or the path of a Hugging Face `config.json`.

        Raises:
          FileNotFoundError: there is neither; the nearest name is offered.
          ValueError: a key is missing, or the model is no untied LLaMA.

        Example:
          >>> from galore_optax import memory
          >>> memory.Sizes.load("7b").layers
          32
        """
        path = config_path(name)
        return _from_hugging_face(json.loads(path.read_text()), path)


def _from_hugging_face(found: dict[str, Any], path: Path) -> Sizes:
    missing = [_KEYS[field] for field in _REQUIRED if _KEYS[field] not in found]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is no LLaMA's config.json. For"
            " another model pass its tree of shapes to galore_optax.memory.plan."
        )
    if found.get("tie_word_embeddings"):
        raise ValueError(
            f"{path}: tie_word_embeddings is true, but the planner's LLaMA has a head"
            " of its own. Pass the tree of shapes to galore_optax.memory.plan."
        )
    return Sizes(**{field: found[key] for field, key in _KEYS.items() if key in found})
