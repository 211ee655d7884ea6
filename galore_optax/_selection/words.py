# SPDX-License-Identifier: Apache-2.0
"""What the name of a leaf says about it, read by whole words.

`multi_head` is no head and `dispatch` no patch: names are split into words, and a
compound is what its last word says (`norm_proj` is a projection).
"""

import functools
import re
from collections.abc import Iterator

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A compound that ends in one of these is a linear map, whatever is before it.
_LINEAR = _set(
    "proj projection projector linear dense mlp fc ffn feedforward mapping modulation"
    " attn attention einsum"
)
_EXPERT = _set("expert experts moe")

_NORM = _set("ln rms bn normalization normalisation")
_AFFINE = _set("scale gamma beta")
_EMBEDDING = _set("emb embs embedder wte wpe")
_POSITION = _set("pos position positions positional rel relative")
_TYPE = _set("type types wpe posemb posembed")
_TABLE = _set("table tables")
_LATENTS = _set("latent latents")
_TOKEN = _set("cls token tokens")
# A module called nothing else: `tok/weight`, `vocab/weight`.
_VOCABULARY = _set("tok toks vocab vocabulary words")
_STATE_SPACE = _set("a_log log_a dt log_dt dt_bias log_step lambda_re lambda_im")

_TABLES = (
    (_set("codebook codebooks"), "codebook"),
    (_set("prompt prompts"), "prompt"),
    (_POSITION, "position"),
)

# Words of which a name may consist that say nothing about the leaf.
_NEUTRAL = _set(
    "w weight kernel value params tok token tokens word words vocab table input"
)
# What is before `head` where it is none of logits.
_OF_ATTENTION = _set("multi attention attn per each talking")
_HEADS = _set("logits unembed unembedding unembedder classifier")
_STACKS = _set("blocks layers stack stacked")


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """`MultiHeadAttention_0` as `("multi", "head", "attention")`."""
    return tuple(word.lower() for word in _WORD.findall(name.replace("MoE", "Moe")))


def parts(path: str) -> list[str]:
    """The names in a path, without the numbers of list entries."""
    return [part for part in path.split("/") if not part.isdigit()] or [path]


def excluded(path: str) -> str | None:
    """Why a leaf so named is no linear map, as an array of any size; else `None`."""
    if is_bias(path):
        return "bias"
    names = parts(path)
    if any(_embeds_patches(words(name)) for name in names):
        return "embedding"
    found = next((role for name in _around(names) if (role := _role(name))), "linear")
    if found != "linear" and not _is_linear_embedder(names):
        return found
    return "head" if is_head(path) else None


def _around(names: list[str]) -> Iterator[str]:
    """The leaf's name, its module's, and the next ones while those say nothing."""
    *above, name = names
    yield name
    for module in reversed(above):
        yield module
        if not _NEUTRAL.issuperset(words(module)):
            return


def _role(name: str) -> str | None:
    """What one name stands for; `linear` where it stands for a linear map."""
    found = words(name)
    if not found:
        return None
    if found[-1] in _LINEAR:
        return "linear"
    if is_norm(name):
        return "norm"
    if any(map(_is_embedding, found)) or _VOCABULARY.issuperset(found):
        return "embedding"
    return "convolution" if any(map(_is_convolution, found)) else None


def is_norm(name: str) -> bool:
    """Whether a leaf or a module so named is a normalisation."""
    found = words(name)
    return name.lower() in _AFFINE or any(
        word in _NORM or word.endswith(("norm", "norms")) for word in found
    )


def _is_embedding(word: str) -> bool:
    if word.startswith("unemb"):
        return False
    endings = ("embed", "embeds", "embedding", "embeddings", "posemb")
    return word in _EMBEDDING or word.endswith(endings)


def _embeds_patches(found: tuple[str, ...]) -> bool:
    return "patch" in found and any(map(_is_embedding, found))


def _is_linear_embedder(names: list[str]) -> bool:
    # A table of rows is called embedding or weight; a kernel embeds continuous inputs.
    return names[-1] == "kernel" and words(names[-2] if names[1:] else "")[-1:] == (
        "embedder",
    )


def _is_convolution(word: str) -> bool:
    return word.endswith(("conv", "convs", "convolution")) or word == "patch"


def is_bias(path: str) -> bool:
    """Whether the leaf's own name ends with the word bias."""
    found = words(path.rsplit("/", 1)[-1])
    return bool(found) and found[-1].endswith(("bias", "biases"))


def is_short_bias(path: str) -> bool:
    """Whether the leaf has a name like `b`, `b1`, `bq` or `b_up`, as by hand."""
    name = path.rsplit("/", 1)[-1]
    return re.match(r"b[a-z]?(?![a-zA-Z])", name) is not None


def is_head(path: str) -> bool:
    """Whether a module that makes logits is on the path."""
    return any(_ends_in_head(words(part)) for part in path.split("/"))


def _ends_in_head(found: tuple[str, ...]) -> bool:
    if found == ("score",) or not _HEADS.isdisjoint(found):
        return True
    before = found[-2] if len(found) > 1 else ""
    return found[-1:] in (("head",), ("lmhead",)) and before not in _OF_ATTENTION


def table(path: str) -> str | None:
    """What a table is called that holds rows to pick from or to add; else `None`."""
    *above, name = parts(path)
    found = words(name)
    if name.lower() in _STATE_SPACE:
        return "state space"
    if name == "kernel" or not found or found[-1] in _LINEAR:
        return None
    if not _LATENTS.isdisjoint(found[-1:]):
        return "latents"
    if not _TOKEN.isdisjoint(found[-1:]):
        return "token"
    module = words(above[-1]) if above and found[-1] in _NEUTRAL else ()
    return _kind_of_table(found) or _kind_of_table(module)


def _kind_of_table(found: tuple[str, ...]) -> str | None:
    if not found or found[-1] in _LINEAR:
        return None
    for kind, reason in _TABLES:
        if not kind.isdisjoint(found):
            return reason
    return "table" if found[-1] in _TABLE else None


def is_state_space(path: str) -> bool:
    """Whether only a state-space model has a leaf so named."""
    return path.rsplit("/", 1)[-1].lower() in _STATE_SPACE


def is_position_or_type(path: str) -> bool:
    """Whether the rows of this embedding are no vocabulary's."""
    return any(
        not (_POSITION | _TYPE).isdisjoint(words(part)) for part in path.split("/")
    )


def is_expert(path: str) -> bool:
    """Whether the leaf belongs to a mixture of experts."""
    return any(not _EXPERT.isdisjoint(words(part)) for part in path.split("/"))


def is_stack(name: str) -> bool:
    """Whether a module so named holds layers."""
    return not _STACKS.isdisjoint(words(name)[-1:])
