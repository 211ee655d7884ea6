# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of a run: written in the background, whole or not at all."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

import adapters
from model import Config
from settings import Settings, differences, to_json
from steps import State


class Restored(NamedTuple):
    """What a run goes on from."""

    state: State
    data: dict[str, Any]  # position of the stream


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True
        )
        self._folder = folder.absolute()
        self._begun: int | None = None
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, step: int, state: State, data: dict[str, Any], run: Settings
    ) -> None:
        """Begins to write; returns once the state is copied."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            settings=ocp.args.JsonSave(to_json(run)),
        )
        self._finish()
        self._begun = step
        with self._clear_errors(step):
            self._manager.save(step, args=items)

    def restore(self, like: State, run: Settings) -> Restored:
        """The last good checkpoint.

        Args:
          like: shapes, dtypes and shardings.
          run: must describe the run that wrote it.

        Raises:
          ValueError: it was written by a run with other settings, which are named.
        """
        read = ocp.args.Composite(settings=ocp.args.JsonRestore())
        saved = self._manager.restore(self.latest, args=read)["settings"]
        found = differences(saved, run)
        if found:
            raise ValueError(
                f"the checkpoint of step {self.latest} in {self._folder} is from"
                f" another run: {'; '.join(found)}. Restore those settings, or"
                " choose another out."
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)),
            data=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(self.latest, args=items)
        return Restored(State(*restored["state"]), restored["data"])

    def close(self) -> None:
        """Waits until what was begun is written."""
        self._finish()
        self._manager.close()

    def _finish(self) -> None:
        with self._clear_errors(self._begun):
            self._manager.wait_until_finished()

    def _clear_errors(self, step: int | None) -> "_ClearErrors":
        return _ClearErrors(self._folder, step)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class _ClearErrors:
    """Says what failed, and what is left, when writing fails."""

    def __init__(self, folder: Path, step: int | None):
        self._folder, self._step = folder, step

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        good = [p.name for p in self._folder.iterdir() if p.name.isdigit()]
        free = shutil.disk_usage(self._folder).free / 2**20
        raise SaveError(
            f"could not write the checkpoint of step {self._step} to {self._folder}"
            f" ({free:,.0f} MiB free): {error}. Steps"
            f" {', '.join(sorted(good, key=int)) or 'none'} are there and whole."
        ) from error


def last_params(folder: Path) -> tuple[Any, Config]:
    """Parameters of the last checkpoint, on the host, and the sizes of their model.

    Those of an adapted model are merged into kernels.

    Raises:
      FileNotFoundError: there is none.
    """
    if not (folder.is_dir() and any(folder.iterdir())):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint. Give the --out of a run that stored one, as"
            " --checkpoint-every 100 does."
        )
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        read = ocp.args.Composite(
            settings=ocp.args.JsonRestore(), state=ocp.args.StandardRestore()
        )
        found = manager.restore(step, args=read)
    sizes = {
        field.name: found["settings"][f"model.{field.name}"]
        for field in dataclasses.fields(Config)
        if f"model.{field.name}" in found["settings"]  # older ones say less
    }
    alpha = found["settings"].get("adapter_alpha", 0.0)
    params = adapters.merged(found["state"]["params"], alpha)
    return jax.device_get(params), Config(**sizes)
