# SPDX-License-Identifier: Apache-2.0
"""Tables of the page "Does my model fit?", written by the planner.

    out/fit/fit/index.js      models, cards, optimizers, workloads
    out/fit/fit/MODEL.js      bytes of every setting of a model

Both are JSON inside of a call, so that a page read from a disk can load them. A model
is planned anew where the package, its configuration or this file changed.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "fit" / "fit"
MODELS = (
    *("130m", "350m", "1b", "3b", "7b", "13b"),
    *("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"),
    *("gemma-2b", "gemma-2-2b", "gemma-3-1b"),
    *("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"),
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"),
    *("smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
)
PLAIN = "adamw", "adamw8bit", "adafactor"
GALORE = "galore_adamw", "galore_adamw8bit", "galore_adafactor"
RANKS = 64, 128, 256, 512, 1024, 2048
DTYPES = "bfloat16", "float32"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "remat": {"remat": True},
    "layerwise": {"remat": True, "layerwise": True},
    "never": {"remat": True, "gradients": "never"},
}
WORKLOADS = [(n, t) for n in (1, 4, 16) for t in (256, 512, 1024, 2048, 4096)]


def optimizers(name: str) -> Iterator[Any]:
    """Those planned for a model, at ranks from a sixteenth to half of its width."""
    from galore_optax.memory import Method, Sizes

    width = Sizes.load(name).width
    ranks = [x for x in RANKS if width <= 16 * x and 2 * x <= width]
    yield from map(Method, PLAIN)
    yield from (Method(x, (("rank", rank),)) for x in GALORE for rank in ranks)


def planned(name: str) -> dict[str, Any]:
    """By optimizer, rank, dtype and way: bytes of the state, by workload the rest."""
    from galore_optax.memory import Setting, Sizes
    from galore_optax.memory._plan import estimate, exact

    sizes, found = Sizes.load(name), {}
    for method, dtype in itertools.product(optimizers(name), DTYPES):
        rank = dict(method.options).get("rank", 0)
        # Layerwise states have a few hundred bytes of counters more.
        known = exact(sizes, method.make(), Setting(dtype=dtype))
        for way in WAYS if rank else [*WAYS][:3]:
            how = [Setting(t, n, dtype=dtype, **WAYS[way]) for n, t in WORKLOADS]
            plans = [estimate(sizes, known, x, str(method)) for x in how]
            found[f"{method.name}/{rank}/{dtype}/{way}"] = _numbers(plans)
    return found


def _numbers(plans: Any) -> dict[str, Any]:
    terms = list(plans[0].terms.values())
    peaks = [list(plan.terms.values())[6:] for plan in plans]
    return {"held": [*terms[:4], terms[4] + terms[5]], "peaks": peaks}


def _stamp(name: str) -> str:
    from galore_optax.memory import config_path

    sources = sorted((ROOT / "galore_optax").rglob("*.py"))
    texts = [
        path.read_bytes() for path in (*sources, config_path(name), Path(__file__))
    ]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def write_model(name: str) -> None:
    """Writes a model's file unless it is of these sources already."""
    path, stamp = FOLDER / f"{name}.js", f"// {_stamp(name)}\n"
    if path.exists() and path.read_text().startswith(stamp):
        return
    text = json.dumps({"name": name, "plans": planned(name)}, separators=(",", ":"))
    path.write_text(f"{stamp}galoreFit.model({text});\n")


def _quiet() -> None:
    """That a rank reaches a dimension is no news here."""
    warnings.simplefilter("ignore", UserWarning)


def index() -> dict[str, Any]:
    from galore_optax.memory._cards import CARDS

    return {
        "models": MODELS,
        "cards": CARDS,
        "methods": [*PLAIN, *GALORE],
        "dtypes": DTYPES,
        "ways": list(WAYS),
        "workloads": WORKLOADS,
    }


def write(*_: Any) -> None:
    """All files, two or more models at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), initializer=_quiet
    ) as pool:
        list(pool.map(write_model, MODELS))
    (FOLDER / "index.js").write_text(f"galoreFit.index({json.dumps(index())});\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
