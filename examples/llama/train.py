# SPDX-License-Identifier: Apache-2.0
"""Trains a LLaMA: `python train.py [SETTINGS.toml] [--steps 1000 ...]`.

Metrics, plot and checkpoints go to `--out`; a run that was interrupted goes on from its
last checkpoint when the same command is given again. On several hosts one command each:
with `--processes N --process I --coordinator HOST:PORT`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import adapters
import c4
import data
import hugging_face
import metrics
import own_text
import pretrained
import processes
from checkpoints import Checkpoints, SaveError
from model import parameter_count
from peaks import peak_flops
from settings import Settings, parse, to_json
from steps import State, state_bytes


@dataclasses.dataclass(frozen=True)
class Text:
    """What a run reads."""

    train: data.Stream
    held_out: list[np.ndarray]  # batches (B, T + 1)
    tokenizer: Tokenizer | None = None  # what an export needs


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind, besides its files."""

    records: list[metrics.Record]
    state: State
    state_bytes: int  # of the optimizer
    tokens_per_second: float  # without compilation, evaluation and checkpoints

    @property
    def perplexity(self) -> float:
        return metrics.series(self.records, "perplexity")[1][-1]


def open_text(run: Settings) -> Text:
    """The training stream at its start, and the held-out batches."""
    run.start.check_text(run.text)
    vocab = run.config.vocab
    if run.text or run.corpus != "c4":
        corpus = _own(run) if run.text else data.load(run.corpus, vocab)
        held_out = corpus.validation_batches(
            run.tokens, run.batch, run.eval_batches or None
        )
        train = corpus.batches(run.tokens, run.batch, run.seed)
        return Text(train, list(held_out), corpus.tokenizer)
    tokenizer = c4.tokenizer(run.tokenizer)
    shape = tokenizer, vocab, run.tokens, run.batch, run.pack
    train = c4.Documents(c4.documents("train", run.c4_files), *shape)
    source = c4.documents("validation", run.c4_files)
    held_out = c4.Documents(source, *shape)  # always the same first batches
    return Text(train, [next(held_out) for _ in range(run.eval_batches or 16)])


def _own(run: Settings) -> data.Corpus:
    files = [Path(run.tokenizer)]
    if run.init_from:
        files.append(pretrained.folder(run.init_from) / "tokenizer.json")
    tokenizer = next((path for path in files if path.is_file()), None)
    size = own_text.Size(run.config.vocab, run.tokens, run.batch)
    return own_text.load(run.text, size, tokenizer)


def evaluate(loss: Any, params: Any, batches: Iterable[Any]) -> dict[str, float]:
    """Token-weighted loss and perplexity, and the perplexity the reference reports.

    The reference averages the means of n batches but divides by n + 1.
    """
    pending = [loss(params, batch) for batch in batches]
    sums = [(float(total), int(count)) for total, count in pending]
    mean = sum(total for total, _ in sums) / sum(count for _, count in sums)
    of_batches = sum(total / max(count, 1) for total, count in sums)
    return {
        "validation_loss": mean,
        "perplexity": perplexity(mean),
        "reference_perplexity": perplexity(of_batches / (len(sums) + 1)),
    }


def perplexity(loss: float) -> float:
    """exp; infinite where no float is so large: the run goes on, and shows it."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


class Interval:
    """The steps since the host last waited for the device."""

    def __init__(self, compiles: bool):
        self.compiles, self.found = compiles, []
        self._started = time.perf_counter()

    def end(self) -> dict[str, float]:
        """Waits; the mean of every metric, and the seconds it took."""
        rows = jax.device_get(self.found)
        means = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        return means | {"seconds": time.perf_counter() - self._started}


class Trainer:
    """A run, from its settings to its last checkpoint."""

    def __init__(self, run: Settings, text: Text | None = None, name: str = ""):
        self.run, self.name = run, name or run.optimizer
        with processes.first_process_first():  # it fills the cache
            self.text = text or open_text(run)
        self.program = run.program()
        self.checkpoints = run.checkpoint_every and Checkpoints(
            run.out / "checkpoints", run.keep
        )
        self.state = self._initial_state()
        self.first = int(self.state.step)
        self.log = self._log()
        if self.text.tokenizer and processes.writes():
            self.text.tokenizer.save(str(run.out / "tokenizer.json"))
        self.update, self.loss = self.program.compiled(self.state)
        self.diagnose = jax.jit(self.program.diagnose)
        self.held_out = [
            part
            for batch in self.text.held_out
            for part in self.program.put_parts(batch)
        ]
        self.seconds, self.tokens = 0.0, 0

    def _log(self) -> metrics.Log | metrics.Unwritten:
        if not processes.writes():
            return metrics.Unwritten()
        return metrics.Log(self.run.out, self.first, self.run.tensorboard)

    def _initial_state(self) -> State:
        run = self.run
        if run.init_from:
            folder = pretrained.folder(run.init_from)
            params = self.program.place(hugging_face.read(folder, run.config))
        else:
            params = self.program.init_params(run.seed)
        state = self.program.init(params)
        if not self.checkpoints or self.checkpoints.latest is None:
            return state
        restored = self.checkpoints.restore(state, run)
        self.text.train.restore(restored.data)
        if processes.writes():
            print(f"resuming {run.out} at step {int(restored.state.step)}")
        return restored.state

    def train(self) -> Result:
        """Every step that is left."""
        try:
            self._steps()
        except BaseException:
            with contextlib.suppress(SaveError):  # what failed first matters
                self.close()
            raise
        self.close()
        return self._result()

    def close(self) -> None:
        """Waits until the last checkpoint is written."""
        self.log.close()
        if self.checkpoints:
            self.checkpoints.close()

    def _steps(self) -> None:
        if self.run.init_from and not self.first:
            self._evaluate(0)
        interval = Interval(compiles=True)
        for step in self._bar():
            batch = self.program.put(next(self.text.train))
            self.state, found = self.update(self.state, batch)
            interval.found.append(found)
            if self._pauses(step):
                self._record(step, interval)
                self._diagnose(step, batch)
                self._evaluate(step)
                self._save(step)
                interval = Interval(compiles=False)

    def _bar(self) -> tqdm:
        steps, total = range(self.first + 1, self.run.steps + 1), self.run.steps
        shown = {"initial": self.first, "unit": "step"}
        shown["disable"] = not processes.writes()
        self.bar = tqdm(steps, self.name.ljust(14), total, **shown)
        return self.bar

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.run.steps)

    def _pauses(self, step: int) -> bool:
        run = self.run
        periods = (
            run.log_every,
            run.diagnose_every,
            run.eval_every,
            run.checkpoint_every,
        )
        return step == self.first + 1 or any(self._due(n, step) for n in periods)

    def _record(self, step: int, interval: Interval) -> None:
        found = interval.end()
        tokens = len(interval.found) * self.run.batch * self.run.tokens
        if not interval.compiles:
            self.seconds += found["seconds"]
            self.tokens += tokens
            found["tokens_per_second"] = tokens / found["seconds"]
            if peak := self._peak_flops():
                flops = found["tokens_per_second"] * self._flops_per_token()
                found["flop_utilisation"] = flops / peak
        found["learning_rate"] = float(self.run.schedule()(step - 1))
        found["tokens"] = step * self.run.batch * self.run.tokens
        self.log.write(step, **found, **_memory())
        speed = f"{found.get('tokens_per_second', 0):,.0f}"
        self.bar.set_postfix({"loss": f"{found['loss']:.3f}", "tokens/s": speed})

    def _peak_flops(self) -> float | None:
        """Of all devices of the run, as given or as known."""
        run = self.run
        if run.peak_flops:
            return run.peak_flops
        one = peak_flops(jax.devices()[0].device_kind, run.compute_dtype)
        return one and one * run.devices

    def _flops_per_token(self) -> float:
        """6 a matrix parameter, 4 a frozen one, and attention's 12 T D a layer."""
        config, params = self.run.config, self.state.params
        count, trained = parameter_count(params), adapters.trained_count(params)
        matrices = 6 * trained + 4 * (count - trained)
        if not config.tied:  # or the embedding is the head, too
            matrices -= 6 * config.vocab * config.width
        return matrices + 12 * config.layers * config.width * self.run.tokens

    def _diagnose(self, step: int, batch: jax.Array) -> None:
        if self._due(self.run.diagnose_every, step):
            found = jax.device_get(self.diagnose(self.state, batch))
            named = {f"projection/{name}": x.item() for name, x in found.items()}
            self.log.write(step, **named)

    def _evaluate(self, step: int) -> None:
        if self._due(self.run.eval_every, step):
            found = evaluate(self.loss, self.state.params, self.held_out)
            self.log.write(step, **found)

    def _save(self, step: int) -> None:
        if self._due(self.run.checkpoint_every, step):
            position = self.text.train.state()
            self.checkpoints.save(step, self.state, position, self.run)

    def _result(self) -> Result:
        records = self.log.records
        if processes.writes():
            self._draw(records)
        return Result(
            records,
            self.state,
            state_bytes(self.state.opt_state),
            self.tokens / self.seconds if self.seconds else 0.0,
        )

    def _draw(self, records: list[metrics.Record]) -> None:
        out = self.run.out
        if records:
            metrics.plot({self.name: records}, out / "loss.png", self.run.start.sizes)
        if any("projection/energy" in record for record in records):
            metrics.plot_projection(records, out / "projection.png", self.name)


def _memory() -> dict[str, int]:
    """Peak bytes in use on the first device, where it says so."""
    found = jax.local_devices()[0].memory_stats() or {}
    peak = found.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_bytes": peak}


def main() -> None:
    try:
        run = parse()
        with processes.together(to_json(run)):
            _say(run, Trainer(run).train())
    except (ValueError, OSError, SaveError) as error:
        raise SystemExit(f"error: {error}") from error


def _say(run: Settings, result: Result) -> None:
    if not processes.writes():
        return
    count = parameter_count(result.state.params)
    trained = adapters.trained_count(result.state.params)
    print(f"{count:,} parameters, {trained:,} of them trained,", end=" ")
    print(f"{result.state_bytes:,} bytes of optimizer state,", end=" ")
    print(f"{result.tokens_per_second:,.0f} tokens/s")
    steps, perplexities = metrics.series(result.records, "perplexity")
    if perplexities:
        before = f", before training {perplexities[0]:.2f}" if steps[0] == 0 else ""
        print(f"validation perplexity {result.perplexity:.2f}{before}")
    print(f"metrics, plot and checkpoints: {run.out}")


if __name__ == "__main__":
    main()
