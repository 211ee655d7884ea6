# SPDX-License-Identifier: Apache-2.0
"""The optimizers of `against_torch.py`, each to live in a process of its own.

All have `load(path)`, which reads gradients, `step() -> seconds` and `facts()`. torch
is imported by its own rivals alone, and JAX's backend is started by its own.
"""

import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.lib.shapes import named, weights
from benchmarks.lib.subjects import InPlace, optimizer

JAX = ("galore_adamw", "galore_optax", "optax.adamw")
TORCH = ("galore-torch", "torch.optim.AdamW", "torch.optim.AdamW, fused")
SCALE = 0.25


def make(name: str, shapes: Any, rank: int, gap: int) -> Any:
    if name in JAX:
        return Jax(name, shapes, rank, gap)
    return Torch(name, named(shapes.tree()), rank, gap)


class Jax:
    """Ours, or optax's."""

    def __init__(self, name: str, shapes: Any, rank: int, gap: int):
        tx = optimizer(name, rank, gap)
        self.subject = InPlace(tx, weights(shapes.tree()))

    def load(self, path: Path) -> None:
        with np.load(path) as saved:
            leaves = [jax.numpy.asarray(saved[x]) for x in named(self.subject.params)]
        self.gradients = jax.tree.structure(self.subject.params).unflatten(leaves)

    def step(self) -> float:
        return self.subject.seconds(self.gradients)

    def facts(self) -> dict[str, Any]:
        return {
            "compile_seconds": self.subject.compile_seconds,
            "state_bytes": self.subject.state_bytes,
        }


class Torch:
    """galore-torch, or torch's own; kernels are transposed, as torch has them."""

    def __init__(self, name: str, shapes: dict[str, Any], rank: int, gap: int):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self.params = {
            path: torch.nn.Parameter(0.02 * torch.randn(_turned(path, shape)))
            for path, shape in shapes.items()
        }
        self.optimizer = torch_optimizer(name, self.params, rank, gap)

    def load(self, path: Path) -> None:
        import torch

        with np.load(path) as saved:
            for name, param in self.params.items():
                found = torch.from_numpy(saved[name])
                whole = found.T.contiguous() if _is_kernel(name) else found
                param.grad = whole

    def step(self) -> float:
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        import torch

        names = ("torch", "galore-torch", "transformers", "bitsandbytes")
        return {
            "state_bytes": sum(map(_bytes, self.optimizer.state.values())),
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in names},
        }


def torch_optimizer(name: str, params: dict[str, Any], rank: int, gap: int) -> Any:
    """`params` by our names, which say what is projected."""
    import torch

    if name == "galore-torch":
        return _galore(params, rank, gap)
    fused = True if name.endswith("fused") else None
    return torch.optim.AdamW(params.values(), lr=1e-3, fused=fused)


def _galore(params: dict[str, Any], rank: int, gap: int) -> Any:
    from galore_torch import GaLoreAdamW

    matrices = [x for name, x in params.items() if is_projected(name)]
    others = [x for name, x in params.items() if not is_projected(name)]
    low = {"rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": "std"}
    groups = [{"params": others}, {"params": matrices, **low}]
    return GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def by_our_names(model: Any) -> dict[str, Any]:
    """The parameters of a Hugging Face LLaMA, those of its blocks told by name."""
    return {
        name.replace("model.layers.", "layers_").replace("_proj.weight", "/kernel"): x
        for name, x in model.named_parameters()
    }


def _is_kernel(path: str) -> bool:
    return path.endswith("kernel")


def is_projected(path: str) -> bool:
    return _is_kernel(path) and path.startswith("layers_")


def _turned(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _is_kernel(path) else shape


def _bytes(state: dict[str, Any]) -> int:
    """Of what the optimizer keeps for one parameter, its projector's storage too."""
    import torch

    found = [x for x in state.values() if isinstance(x, torch.Tensor)]
    projector = getattr(state.get("projector"), "ortho_matrix", None)
    if projector is not None:
        found.append(projector)
    return sum(x.untyped_storage().nbytes() for x in found)
