# SPDX-License-Identifier: Apache-2.0
"""Draws which device has what of a stack, its projectors and its moments.

As `galore_optax.state_shardings` says for four devices; nothing is measured.

python -m benchmarks.memory.draw_sharding
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import galore_optax
from benchmarks.lib import pictures
from benchmarks.lib.pictures import GREY, SEQUENCE

DEVICES, LAYERS, ROWS, COLUMNS, RANK = 4, 4, 64, 160, 16
LAYOUTS = {
    "along the kept axis": ((None, None, "fsdp"), ()),
    "along the projected axis": ((None, "fsdp"), ()),
    "along the layers": (("fsdp",), ()),
    'not at all,\nspread="fsdp"': ((), ("fsdp",)),
}
_SHIFT = 11  # of one sheet of a stack from the one in front of it


class Drawn(NamedTuple):
    """An array (layers, rows, columns) and the mesh axis of each of its axes."""

    name: str
    rows: int
    columns: int
    spec: tuple[str | None, ...]


def arrays(spec: tuple[Any, ...], spread: tuple[str, ...]) -> list[Drawn]:
    mesh = AbstractMesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    lying = NamedSharding(mesh, PartitionSpec(*spec))
    shape = (LAYERS, ROWS, COLUMNS)
    params = {"layers": {"up": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    tx = galore_optax.galore(optax.adam(1e-3), rank=RANK)
    state = galore_optax.state_shardings(tx, params, lying, spread=spread)
    moment = state.inner_state[0].mu["layers"]["up"]
    projector = state.projector["layers"]["up"]
    return [
        Drawn("W, updates", ROWS, COLUMNS, _entries(lying)),
        Drawn("P", ROWS, RANK, _entries(projector)),
        Drawn("R, moments", RANK, COLUMNS, _entries(moment)),
    ]


def _entries(sharding: NamedSharding) -> tuple[str | None, ...]:
    return (*sharding.spec, *[None] * (3 - len(sharding.spec)))


def parts(drawn: Drawn, layer: int) -> Iterator[tuple[int | None, Sequence[float]]]:
    """Devices, `None` for all of them, and their rectangles of one sheet."""
    height, width = drawn.rows, drawn.columns
    if not any(drawn.spec):
        yield None, (0, 0, width, height)
    elif drawn.spec[0]:
        yield layer * DEVICES // LAYERS, (0, 0, width, height)
    for device in range(DEVICES) if any(drawn.spec[1:]) else ():
        if drawn.spec[1]:
            band = height / DEVICES
            yield device, (0, height - (device + 1) * band, width, band)
        else:
            band = width / DEVICES
            yield device, (device * band, 0, band, height)


def draw_stack(axes: Axes, drawn: Drawn, left: float) -> None:
    colours = matplotlib.colormaps[SEQUENCE]
    for layer in reversed(range(LAYERS)):
        for device, (x, y, width, height) in parts(drawn, layer):
            shade = GREY if device is None else colours(0.15 + 0.8 * device / DEVICES)
            corner = left + x + layer * _SHIFT, y + layer * _SHIFT
            axes.add_patch(
                Rectangle(
                    corner, width, height, facecolor=shade, edgecolor="white", lw=0.8
                )
            )


def draw_row(axes: Axes, title: str, found: Sequence[Drawn], names: bool) -> None:
    left, top = 0.0, ROWS + LAYERS * _SHIFT
    for drawn in found:
        draw_stack(axes, drawn, left)
        if names:
            axes.text(left, top + 6, drawn.name, fontsize=11)
        said = ", ".join("–" if x is None else x for x in drawn.spec)
        axes.text(left, -6, f"({said})", fontsize=9, va="top", color=GREY)
        left += max(drawn.columns, 50) + LAYERS * _SHIFT + 25
    axes.text(-12, ROWS / 2, title, fontsize=11, ha="right", va="center")
    axes.set(xlim=(-118, left - 20), ylim=(-24, top + 24), aspect="equal")
    axes.axis("off")


def draw() -> None:
    picture = pictures.figure(9.2, 6.6)
    rows = picture.subplots(len(LAYOUTS), 1)
    for number, (axes, title) in enumerate(zip(rows, LAYOUTS, strict=True)):
        draw_row(axes, title, arrays(*LAYOUTS[title]), names=number == 0)
    caption = (
        "Who has what of four layers W (64, 160), rank 16, on four devices: a colour a"
        " device, grey what all of them have. Rows: how the parameters are split;"
        " below each array the mesh axis of its axes, layers first. As"
        " galore_optax.state_shardings says."
    )
    pictures.save(picture, "sharding", caption)


if __name__ == "__main__":
    draw()
