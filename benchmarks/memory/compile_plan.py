# SPDX-License-Identifier: Apache-2.0
"""A plan beside what a compiler assigns, for a device that need not be there.

python -m benchmarks.memory.compile_plan rtx4090 7b --method galore_adamw8bit --remat

After the target come the arguments of `python -m galore_optax plan`. Needs the extra
aot-cuda, or aot-tpu for a TPU; returns 1 where a program does not fit.
"""

import sys
from collections.abc import Sequence

from benchmarks.memory.assignment import Assignment, compile_step
from benchmarks.memory.targets import Target, target
from galore_optax import memory
from galore_optax.memory import Method, Plan, Setting, Sizes, _cli
from galore_optax.memory._show import gigabytes, ruled


def main(arguments: Sequence[str]) -> int:
    """Returns 0; 1 where a program does not fit; 2 for an error, which is printed."""

    def run() -> int:
        if not arguments:
            raise ValueError(__doc__)
        device = target(arguments[0])
        device.prepare()
        found = _cli.parser().parse_args(["plan", *arguments[1:]])
        sizes, methods, setting = _cli.chosen(found)
        ranked = [_cli.with_rank(method, sizes) for method in methods]
        fits = [_compile(sizes, method, setting, device) for method in ranked]
        return 0 if all(fits) else 1

    return _cli.told(run)


def _compile(sizes: Sizes, method: Method, setting: Setting, device: Target) -> bool:
    found = compile_step(sizes, method.make(), setting, device)
    print(f"\n{method}, {setting}, compiled for {device.name}:")
    if found.refused is None:
        print(comparison(memory.plan(sizes, method, setting), found))
    print(verdict(found))
    return found.fits


def comparison(plan: Plan, found: Assignment) -> str:
    """The compiler's buffer assignment beside the estimate, with their differences."""
    arguments = plan.weights + plan.state.total + found.tokens
    rows = [["", "estimate", "compiler", "difference"]]
    rows += [_compared("weights, state, tokens", arguments, found.arguments)]
    rows += [_compared("temporaries", plan.peak.total, found.temporaries)]
    rows += [_compared("new outputs", 0, found.outputs - found.aliased)]
    rows += [_compared("total", plan.total + found.tokens, found.total)]
    return ruled(rows, after=(0, -2))


def _compared(name: str, ours: int, theirs: int) -> list[str]:
    share = f"{(ours - theirs) / theirs:+.1%}" if theirs and ours else ""
    return [name, gigabytes(ours), gigabytes(theirs), share]


def verdict(found: Assignment) -> str:
    """Whether the program fits the target."""
    have = gigabytes(found.capacity)
    if found.total <= found.capacity:
        left = gigabytes(found.capacity - found.total)
        return f"fits {found.target}: {gigabytes(found.total)} of {have}, {left} free."
    excess = gigabytes(found.total - found.capacity)
    refused = " The compiler refused it." if found.refused is not None else ""
    return (
        f"does not fit {found.target}: {gigabytes(found.total)}, {excess} more than its"
        f" {have}.{refused}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
