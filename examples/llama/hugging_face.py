# SPDX-License-Identifier: Apache-2.0
"""To and from Hugging Face's LLaMA: a folder with config.json and model.safetensors.

    python hugging_face.py RUN FOLDER      exports the last checkpoint of a run

Kernels here are (in, out), stacked over layers; weights there (out, in), one a layer.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import data
from model import Config

# Path inside `layers`, name inside `model.layers.N.`; True for transposed kernels.
_LAYERS = [
    *((f"attn/{x}/kernel", f"self_attn.{x}_proj.weight", True) for x in "qkvo"),
    *(
        (f"mlp/{x}/kernel", f"mlp.{x}_proj.weight", True)
        for x in ("gate", "up", "down")
    ),
    ("attn_norm/scale", "input_layernorm.weight", False),
    ("mlp_norm/scale", "post_attention_layernorm.weight", False),
]
_OTHERS = [
    ("embed/embedding", "model.embed_tokens.weight", False),
    ("norm/scale", "model.norm.weight", False),
]
_HEAD = [("lm_head/kernel", "lm_head.weight", True)]


def _others(config: Config) -> list[tuple[str, str, bool]]:
    return _OTHERS if config.tied else _OTHERS + _HEAD


def write(
    folder: Path, params: Any, config: Config, tokenizer: Path | None = None
) -> None:
    """Writes a folder that `LlamaForCausalLM.from_pretrained` loads, whole or not.

    With a `tokenizer.json` it is one for `AutoTokenizer`, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = _write_tokenizer(folder, tokenizer) if tokenizer else {}
    tensors = to_tensors(params, config)
    partial = folder / "model.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    dtype = str(next(iter(tensors.values())).dtype)
    found = config.to_hugging_face() | ends | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(found, indent=2))


def _write_tokenizer(folder: Path, file: Path) -> dict[str, int]:
    """Returns what `config.json` says of the end of a text."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.save(str(folder / "tokenizer.json"))
    found = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ends = data.end_tokens(tokenizer)
    if ends:
        found["eos_token"] = ends[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(found, indent=2))
    if not ends:
        return {}
    number = tokenizer.token_to_id(ends[0])
    return {"bos_token_id": number, "eos_token_id": number}


def read(folder: Path, config: Config) -> Any:
    """The parameters in a folder, as a nested dict of NumPy arrays.

    Raises:
      FileNotFoundError: there is no safetensors file.
      ValueError: a tensor is missing or has another shape, which is named.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file.")
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        with safe_open(path, "numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in list(opened.keys())}
    return from_tensors(tensors, config)


def to_tensors(params: Any, config: Config) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face's names."""
    tensors = {
        theirs: _turned(_at(params, ours), t) for ours, theirs, t in _others(config)
    }
    for ours, theirs, transposed in _LAYERS:
        stacked = np.asarray(_at(params["layers"], ours))
        for layer in range(config.layers):
            name = f"model.layers.{layer}.{theirs}"
            tensors[name] = _turned(stacked[layer], transposed)
    return tensors


def from_tensors(tensors: dict[str, np.ndarray], config: Config) -> Any:
    """The inverse of `to_tensors`."""
    if "lm_head.weight" not in tensors:  # it was tied, and will not be
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    expected = {
        "model.embed_tokens.weight": (config.vocab, config.width),
        "lm_head.weight": (config.vocab, config.width),
    }
    params: dict[str, Any] = {"layers": {}}
    for ours, theirs, transposed in _others(config):
        value = _turned(_tensor(tensors, theirs, expected.get(theirs)), transposed)
        _put(params, ours, value)
    for ours, theirs, transposed in _LAYERS:
        shape = _layer_shape(theirs, config)
        names = [f"model.layers.{i}.{theirs}" for i in range(config.layers)]
        layers = [_turned(_tensor(tensors, name, shape), transposed) for name in names]
        _put(params["layers"], ours, np.stack(layers))
    return params


def _layer_shape(name: str, config: Config) -> tuple[int, ...]:
    width, hidden = config.width, config.hidden
    if "layernorm" in name:
        return (width,)
    if "down" in name:
        return (width, hidden)
    if "mlp" in name:
        return (hidden, width)
    keys = name.startswith(("self_attn.k", "self_attn.v"))
    return (config.key_width if keys else width, width)


def _tensor(
    tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...] | None
) -> np.ndarray:
    if name not in tensors:
        raise ValueError(
            f"tensor '{name}' is missing: is this a LLaMA of as many layers?"
        )
    found = tensors[name]
    if shape is not None and found.shape != shape:
        raise ValueError(
            f"tensor '{name}' has shape {found.shape}, the model needs {shape}. Give"
            " the config.json of those weights as the model."
        )
    return found


def _turned(value: Any, transposed: bool) -> np.ndarray:
    value = np.asarray(value)
    return np.ascontiguousarray(value.T) if transposed else value


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def main(told: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the --out of a training run")
    parser.add_argument("folder", type=Path, help="where to write")
    arguments = parser.parse_args(told)
    try:
        export(arguments.run, arguments.folder)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {arguments.folder}")


def export(run: Path, folder: Path) -> None:
    """Writes what the last checkpoint of a run holds.

    Raises:
      OSError: there is no checkpoint, or the folder cannot be written.
    """
    from checkpoints import last_params

    params, config = last_params(run / "checkpoints")
    tokenizer = run / "tokenizer.json"
    write(folder, params, config, tokenizer if tokenizer.is_file() else None)


if __name__ == "__main__":
    main()
