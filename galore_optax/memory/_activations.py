# SPDX-License-Identifier: Apache-2.0
"""Bytes of a LLaMA's activations, by formula.

N tokens of a micro-batch in sequences of T, itemsize s, and the letters of `_llama.py`.
The counts are of what JAX saves and what XLA's GPU compiler holds at its peak. The
attention is XLA's, which writes out the (H, T, T) scores of every sequence.
"""

import dataclasses

from galore_optax.memory._setting import Setting
from galore_optax.memory._sizes import Sizes

_MASK = 1  # byte of a bool
_WIDE = 4  # bytes of f32, in which scores, norms and the loss are computed


@dataclasses.dataclass(frozen=True)
class Activations:
    """What one micro-batch keeps, and what it needs at a time."""

    sizes: Sizes
    setting: Setting

    @property
    def _count(self) -> int:
        return self.setting.batch * self.setting.tokens

    @property
    def _scores(self) -> int:
        """Entries of the attention scores of a layer: H · T · N."""
        return self.sizes.heads * self.setting.tokens * self._count

    @property
    def layer_input(self) -> int:
        """Of one layer: s · N · D."""
        return self.setting.itemsize * self._count * self.sizes.width

    @property
    def layer_saved(self) -> int:
        """What one layer keeps for its backward pass without remat.

        s·(6F + 4D + 2HK + 2GK)·N of products' inputs, 8·D·N of two norms in f32, and
        (4 + s)·H·T·N of attention weights, in f32 and rounded.
        """
        z, s = self.sizes, self.setting.itemsize
        entries = 6 * z.hidden + 4 * z.width + 2 * z.query_width + 2 * z.key_width
        norms = 2 * _WIDE * z.width
        return (s * entries + norms) * self._count + (_WIDE + s) * self._scores

    @property
    def saved(self) -> int:
        """Of all layers: their inputs with remat, all they keep without."""
        one = self.layer_input if self.setting.remat else self.layer_saved
        return self.sizes.layers * one

    @property
    def logits(self) -> int:
        """(4 + s)·N·V: in f32 for the loss, and their gradient."""
        return (_WIDE + self.setting.itemsize) * self._count * self.sizes.vocab

    @property
    def logit_gradients(self) -> int:
        """s·N·V."""
        return self.setting.itemsize * self._count * self.sizes.vocab

    @property
    def head_workspace(self) -> int:
        """2·s·N·D: the normed input of the head and its gradient."""
        return 2 * self.layer_input

    @property
    def block_workspace(self) -> int:
        """Of the backward pass of one layer.

        (8 + s + 1)·H·T·N: scores and their gradient in f32, one rounded copy, the mask;
        2·s·F·N: gradients of gate and up.
        """
        s = self.setting.itemsize
        scores = (2 * _WIDE + s + _MASK) * self._scores
        return scores + 2 * s * self.sizes.hidden * self._count
