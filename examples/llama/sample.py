# SPDX-License-Identifier: Apache-2.0
"""Goes on from a prompt, always with the likeliest token.

python sample.py smollm2-135m --prompt "The capital of France is"
python sample.py FOLDER --prompt ...      what hugging_face.py wrote
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tokenizers import Tokenizer

import hugging_face
import pretrained
from data import end_tokens
from model import Config, LLaMA


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for."""

    model: Annotated[Path, tyro.conf.Positional]
    """smollm2-135m, or a folder with config.json, safetensors and tokenizer.json."""
    prompt: str
    tokens: int = 40
    """At most so many are added."""

    def __post_init__(self) -> None:
        pretrained.check(self.model)
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1.")


def sample(request: Request) -> str:
    """The prompt and what follows.

    Raises:
      FileNotFoundError: the folder lacks weights or a tokenizer.
      ValueError: the prompt has no token, or more than the model takes.
    """
    folder = pretrained.folder(request.model)
    config = Config.load(str(folder / "config.json"))
    params = jax.device_put(hugging_face.read(folder, config))
    return answer(params, config, folder, request)


def answer(params: Any, config: Config, folder: Path, request: Request) -> str:
    """The same, by parameters at hand; `folder` has the tokenizer."""
    tokenizer = _tokenizer(folder)
    start = tokenizer.encode(request.prompt, add_special_tokens=False).ids
    if not 0 < len(start) <= config.max_tokens - request.tokens:
        raise ValueError(
            f"a prompt of {len(start)} tokens and tokens={request.tokens} more: the"
            f" model takes 1 to {config.max_tokens} in all."
        )
    ends = {tokenizer.token_to_id(end) for end in end_tokens(tokenizer)}
    return tokenizer.decode(greedy(params, config, start, request.tokens, ends))


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json. Put that of the model there."
        )
    return Tokenizer.from_file(str(file))


def greedy(
    params: Any, config: Config, start: list[int], count: int, ends: set[int]
) -> list[int]:
    """`start` and at most `count` tokens more, each the likeliest; an end is left out.

    Nothing is kept of a token for the next: simple, and slow for long texts.
    """
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: LLaMA(config, nnx.Rngs(0))), nnx.Param
    )

    @jax.jit
    def following(params: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, nnx.State(params))(tokens[None])  # (1, T, V)
        return jnp.argmax(logits[0, length - 1])

    tokens = np.zeros(len(start) + count, np.int32)
    tokens[: len(start)] = start
    for length in range(len(start), len(tokens)):
        tokens[length] = following(params, tokens, length)
        if int(tokens[length]) in ends:
            return tokens[:length].tolist()
    return tokens.tolist()


def main() -> None:
    try:
        print(sample(tyro.cli(Request)))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
