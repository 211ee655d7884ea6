# SPDX-License-Identifier: Apache-2.0
"""Everything that defines a run: defaults, then a TOML file, then the command line."""

import dataclasses
import math
import sys
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import optax
import tyro

from galore_optax import memory
from galore_optax.layerwise import (
    Clip,
    clip_by_global_norm,
    clip_by_projected_norm,
)

import adapters
import attention
import optimizers
import own_text
import processes
import relora
from adapted import AdaptedProgram, Adapter
from corpora import CORPORA
from model import Config, Numerics
from never_formed import NeverFormedProgram
from pretrained import Start
from steps import LayerProgram, Program, checked_axes, make_mesh


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training run. The first argument may be a TOML file with any of these."""

    model: str = ""
    """9m to 13b, demo or the path of a config.json. "": init_from's, or else demo."""
    corpus: str = "prose"
    """prose, core or c4."""
    text: str = ""
    """Text of one's own in place of a corpus: a file in UTF-8, or a quoted pattern such
    as 'notes/**/*.txt'. Its tokens are those of a model to start from (init_from), of
    tokenizer if that is a file, or else of a BPE trained on it."""
    optimizer: str = "galore_adamw"
    """AdamW is the yardstick: adamw. Any optimizer of optax, with galore_ before it for
    its projected version, 8bit after it for moments in eight bits; or muon, which is
    that of optax.contrib for the layers' matrices and AdamW for the rest."""
    options: tuple[str, ...] = ()
    """Of the optimizer, as in: rank=128 scale=0.25 subspace=svd weight_decay=0.01."""

    steps: int = 400
    batch: int = 8
    """Sequences an optimizer step."""
    accumulation: int = 1
    """Parts of a batch whose gradients are added up one after the other."""
    tokens: int = 128
    """Tokens a sequence."""

    learning_rate: float = 5e-3
    """At its peak."""
    matrix_rate: float = 1.0
    """Learning rate of the layers' matrices, relative to that of the rest; with an
    adapter that of its two factors. At 0 they stay as they are and have no state."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    final_rate: float = 0.1
    """Share of the peak that the cosine ends at."""
    clip: float = 1.0
    """Largest global norm of the gradients; 0 clips nothing."""
    clip_projected: bool = False
    """Clip by the norm of the projected gradients: with layerwise, where it takes one
    backward pass and the global norm two, and allows accumulation; with gradients=never
    the only norm there is."""

    adapter: str = ""
    """lora, relora or factors in place of the layers' matrices. Embeddings, head and
    norms are trained in full."""
    adapter_rank: int = 64
    adapter_alpha: float = 32.0
    """Of lora and relora: what they add is multiplied by alpha / rank."""
    adapter_reset: int = 0
    """Of relora: steps after which it is merged and begun anew."""
    adapter_warmup: int = 10
    """Of relora: steps over which the learning rate rises after that."""

    compute_dtype: str = "float32"
    params_dtype: str = "float32"
    attention: str = "auto"
    """xla, which writes out the scores; cudnn, the fused kernel of NVIDIA GPUs, for a
    compute_dtype of 16 bits; or auto: cudnn where it runs, else xla."""
    remat: bool = False
    """Recompute activations inside a layer in the backward pass: less memory."""
    layerwise: bool = False
    """Update each layer as soon as its gradient is there, and drop the gradient."""
    gradients: str = "formed"
    """formed; or never, for optimizers with galore_ before their name: what a matrix's
    gradient is made of is projected instead."""
    mesh: tuple[str, ...] = ()
    """Devices by axis, as in: data=2 fsdp=4 tensor=2. Batches are split over data and
    fsdp, parameters over fsdp and tensor."""
    processes: int = 1
    """Programs that train together, each started by this command with its own number
    (process), all with the same folder (out) and one mesh of all their devices."""
    process: int = 0
    """Which of the processes this is, from 0; that one writes metrics and pictures."""
    coordinator: str = ""
    """HOST:PORT on which process 0 listens to the others."""

    seed: int = 0
    eval_every: int = 50
    eval_batches: int = 16
    """0: all held-out text of a packaged corpus."""
    log_every: int = 10
    diagnose_every: int = 0
    """Steps between records of what a projection captures, by path, for optimizers with
    galore_ before their name; each takes one more gradient. 0 records none."""
    checkpoint_every: int = 0
    """Steps; 0 saves none."""
    keep: int = 2
    """Checkpoints kept."""
    out: Path = Path("out/run")
    """Folder of metrics, plot and checkpoints. A run found there is resumed."""
    init_from: Path | None = None
    """Folder of a Hugging Face LLaMA to start from; or smollm2-135m, to be fetched."""
    tensorboard: bool = False
    peak_flops: float = 0.0
    """Of all devices, per second, to report the share in use; 0 takes that of known
    accelerators, and reports none of others."""

    c4_files: str | None = None
    """Folder with local files of C4; by default it is streamed from the hub."""
    tokenizer: str = "t5-base"
    """For C4: a name on the hub or a tokenizer.json; for text the latter."""
    pack: bool = True
    """For C4: fill sequences with documents end to end, or cut and pad each as the
    reference does."""

    def __post_init__(self) -> None:
        sizes = "steps", "batch", "accumulation", "tokens", "keep", "log_every"
        for name in (*sizes, "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch % self.accumulation:
            raise ValueError(
                f"batch={self.batch} cannot be divided into"
                f" accumulation={self.accumulation} equal parts."
            )
        if self.corpus not in (*CORPORA, "c4"):
            known = ", ".join((*CORPORA, "c4"))
            raise ValueError(f"unknown corpus {self.corpus!r}; known: {known}.")
        self.start.check()
        own_text.check(self.text)
        devices, part = self.batch_devices, self.batch // self.accumulation
        if part % devices:
            raise ValueError(
                f"batch={self.batch} in {self.accumulation} parts leaves {part}"
                f" sequences at a time, which {devices} devices cannot share evenly."
            )
        if self.tokens > self.config.max_tokens:
            raise ValueError(
                f"tokens={self.tokens} is more than the {self.config.max_tokens} that"
                f" model {self.start.sizes!r} is made for."
            )
        attention.check(self.attention, self.compute_dtype)
        processes.check(self.processes, self.process, self.coordinator, self.axes)
        self._check_gradients()
        self._check_layerwise()
        self._check_adapter()
        self._check_diagnosed()
        self.transformation()

    def _check_gradients(self) -> None:
        if self.gradients not in ("formed", "never"):
            raise ValueError(f"gradients={self.gradients!r} is not formed or never.")
        if self.clip_projected and not (self.layerwise or self._never_formed):
            raise ValueError(
                "clip_projected goes with layerwise or gradients=never; add one."
            )
        if self._never_formed:
            self._check_never_formed()

    def _check_never_formed(self) -> None:
        if not self.projects:
            raise ValueError(
                f"gradients=never with optimizer={self.optimizer}, which needs them"
                f" whole. Take 'galore_{self.optimizer}', or gradients=formed."
            )
        if self.layerwise and not self.remat:
            raise ValueError(
                "gradients=never with layerwise runs each layer again for its gradient."
                " Add remat."
            )
        if self.clip and not self.clip_projected:
            raise ValueError(
                f"gradients=never has no gradient whose norm clip={self.clip} could"
                " measure. Add clip_projected, or give clip=0."
            )

    def _check_layerwise(self) -> None:
        full_norm = self.clip and not self.clip_projected
        if self.layerwise and full_norm and self.accumulation > 1:
            raise ValueError(
                f"layerwise with accumulation={self.accumulation} never holds the whole"
                f" gradient that clip={self.clip} measures. Add clip_projected, or give"
                " clip=0."
            )

    def _check_adapter(self) -> None:
        name = f"adapter={self.adapter}"
        smaller = self.config.smallest
        if self.low_rank and self.adapter_rank > smaller:
            raise ValueError(
                f"adapter_rank={self.adapter_rank} is more than the {smaller} that a"
                f" matrix of model {self.start.sizes!r} can have. Give less."
            )
        if self.adapter and self.layerwise:
            raise ValueError(
                f"{name} with layerwise: what an adapter trains is small, and its"
                " gradients need no dropping. Leave one of them out."
            )
        if self.adapter and self.projects:
            raise ValueError(
                f"{name} with optimizer={self.optimizer}: two low-rank methods at once."
                f" Take {self.optimizer.removeprefix('galore_')!r}."
            )
        if self.adapter == "relora":
            periods = self.adapter_warmup, self.adapter_reset, self.steps
            relora.check(self.optimizer, *periods)

    def _check_diagnosed(self) -> None:
        if not self.diagnose_every:
            return
        if not self.projects:
            raise ValueError(
                f"diagnose_every={self.diagnose_every} with optimizer={self.optimizer},"
                f" which projects nothing. Take 'galore_{self.optimizer}', or give"
                " diagnose_every=0."
            )
        if self.layerwise or self._never_formed:
            raise ValueError(
                f"diagnose_every={self.diagnose_every} forms all gradients, which"
                " layerwise and gradients=never are there to avoid. Leave it out, or"
                " these."
            )

    @property
    def projects(self) -> bool:
        """Whether the optimizer is GaLore or one of its family."""
        return memory.Method(self.optimizer).is_galore

    @property
    def low_rank(self) -> Adapter | None:
        """What takes the place of the layers' matrices, if anything does."""
        if not self.adapter:
            return None
        return Adapter(
            self.adapter,
            self.adapter_rank,
            self.adapter_alpha,
            self.adapter_reset,
            self.seed,
        )

    @property
    def _never_formed(self) -> bool:
        return self.gradients == "never"

    @property
    def start(self) -> Start:
        return Start(self.model, self.init_from)

    @property
    def config(self) -> Config:
        return Config.load(self.start.sizes)

    @property
    def axes(self) -> dict[str, int]:
        """Devices by mesh axis."""
        return checked_axes(memory.parse_options(self.mesh))

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def batch_devices(self) -> int:
        """Over how many a batch is split."""
        return self.axes.get("data", 1) * self.axes.get("fsdp", 1)

    def schedule(self) -> optax.Schedule:
        """Linear warm-up, then a cosine to a share of the peak; jagged for relora."""
        peak, end = self.learning_rate, self.learning_rate * self.final_rate
        steps, warmup = self.steps, int(self.steps * self.warmup)
        smooth = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
        if self.adapter == "relora":
            smooth = relora.jagged(smooth, self.adapter_reset, self.adapter_warmup)
        return smooth

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, the optimizer, and the matrices' own rate."""
        options = memory.parse_options(self.options)
        tx = optimizers.make(self.optimizer, self.schedule(), options)
        clips = self.clip and not (self.layerwise or self._never_formed)
        parts = [optax.clip_by_global_norm(self.clip)] if clips else []
        parts.append(tx)
        if self.matrix_rate == 0:
            parts = [optimizers.fix_matrices(optax.chain(*parts))]
        elif self.matrix_rate != 1:
            scaled = optax.scale(self.matrix_rate)
            parts.append(optax.masked(scaled, optimizers.matrices_of_layers))
        if not self.adapter:
            return optax.chain(*parts)
        return optax.masked(optax.chain(*parts), adapters.trained)

    def program(self) -> Program:
        """The model and the optimizer as functions on this run's devices."""
        tx, mesh = self.transformation(), make_mesh(self.axes)
        parts = self.config, self._numerics(), tx, self.accumulation, mesh
        if self.low_rank:
            return AdaptedProgram(*parts, self.low_rank)
        if self.layerwise:
            return LayerProgram(*parts, self._clip(), not self._never_formed)
        if self._never_formed:
            return NeverFormedProgram(*parts, self.clip)
        return Program(*parts)

    def _numerics(self) -> Numerics:
        head, compute = self.config.head_size, self.compute_dtype
        kernel = attention.implementation(self.attention, compute, head)
        return Numerics(self.compute_dtype, self.params_dtype, self.remat, kernel)

    def _clip(self) -> Clip | None:
        if not self.clip:
            return None
        by = clip_by_projected_norm if self.clip_projected else clip_by_global_norm
        return by(self.clip)


# What may differ between a run and its resumption: kernels, coordinates and sums over
# devices differ in last bits alone; of a model the sizes are compared.
FREE = {
    *("out", "keep", "checkpoint_every", "log_every", "tensorboard", "peak_flops"),
    *("diagnose_every", "eval_every", "eval_batches", "init_from", "c4_files"),
    *("attention", "gradients", "mesh", "processes", "process", "coordinator", "model"),
}


def differences(saved: dict[str, Any], settings: Settings) -> list[str]:
    """How the settings of a checkpoint differ from those of a run, field by field."""
    now = to_json(settings)
    return [
        f"{name} was {saved.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in FREE and saved.get(name) != value
    ]


def to_json(settings: Settings) -> dict[str, Any]:
    found = dataclasses.asdict(settings)
    found |= {f"model.{k}": v for k, v in dataclasses.asdict(settings.config).items()}
    return {
        k: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v
        for k, v in found.items()
    }


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line, and from a TOML file if that comes first."""
    arguments = sys.argv[1:] if arguments is None else arguments
    default = Settings()
    if arguments and arguments[0].endswith(".toml"):
        default, arguments = read(Path(arguments[0])), arguments[1:]
    return tyro.cli(Settings, default=default, args=arguments)


def read(path: Path) -> Settings:
    """Settings from a TOML file; options and mesh may be tables."""
    found = tomllib.loads(path.read_text())
    known = [field.name for field in dataclasses.fields(Settings)]
    for name, value in found.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: unknown setting {name!r}.{hint}")
        if isinstance(value, dict):
            found[name] = tuple(f"{key}={item}" for key, item in value.items())
        elif isinstance(value, list):
            found[name] = tuple(value)
        elif name in ("out", "init_from"):
            found[name] = Path(value)
    return Settings(**found)
