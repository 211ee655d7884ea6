# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention, and what share of an accelerator is in use."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
import train
from .helpers import opened, tiny
from model import Config, LLaMA, Numerics
from peaks import peak_flops
from settings import Settings

fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

SMALL = Config(vocab=100, width=32, hidden=48, layers=2, heads=2, max_tokens=64)
H200 = types.SimpleNamespace(
    platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200"
)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H200 with cuDNN, as far as tracing and lowering go."""
    monkeypatch.setattr(jax, "devices", lambda: [H200])
    for name, answer in (
        ("check_cudnn_version", lambda: 91_000),
        ("check_compute_capability", lambda capability: True),
        ("is_cuda_compute_capability_equal", lambda capability: False),
    ):
        monkeypatch.setattr(fused, name, answer)


def lowered(numerics: Numerics, platform: str) -> str:
    """The gradient of a model's loss."""
    model = nnx.eval_shape(lambda: LLaMA(SMALL, nnx.Rngs(0), numerics))
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens).astype(jnp.float32).std()

    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(params, tokens)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("cudnn")
def test_the_fused_kernel_is_in_the_program() -> None:
    kernel = attention.implementation("auto", "bfloat16", 16)
    assert kernel == attention.implementation("cudnn", "bfloat16", 16) == "cudnn"
    numerics = Numerics("bfloat16", attention=kernel)
    text = lowered(numerics, "cuda")
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    scores = "tensor<2x2x24x24x"  # batch, heads, tokens, tokens
    assert scores not in text
    assert scores in lowered(Numerics("bfloat16"), "cuda")


@pytest.mark.usefixtures("cudnn")
def test_auto_is_xla_where_the_fused_kernel_cannot_run() -> None:
    assert attention.implementation("auto", "float32", 16) == "xla"
    assert attention.implementation("auto", "bfloat16", 12) == "xla"  # no multiple of 8
    with pytest.raises(ValueError, match=r"of 8, but got 12\. Take"):
        attention.implementation("cudnn", "bfloat16", 12)


def test_old_gpus_and_other_devices_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="the device is no NVIDIA GPU but 'cpu'"):
        attention.implementation("cudnn", "bfloat16", 16)
    assert attention.implementation("auto", "bfloat16", 16) == "xla"
    old = {"platform": "gpu", "compute_capability": "7.5", "device_kind": "Tesla T4"}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**old)])
    with pytest.raises(ValueError, match=r"Tesla T4 has compute capability 7\.5, b"):
        attention.implementation("cudnn", "float16", 16)


def test_a_run_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="unknown attention='flash'; known: auto, xla"):
        Settings(attention="flash")
    with pytest.raises(ValueError, match="cudnn with compute_dtype=float32"):
        Settings(attention="cudnn")
    run = Settings(attention="cudnn", compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="attention=cudnn: the device is no NVIDIA"):
        run.program()
    assert Settings().program().numerics == Numerics()


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float32", 494),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla T4", "float16", 65),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", 918),
    ],
)
def test_peaks_of_known_accelerators(kind: str, dtype: str, tera: float) -> None:
    assert peak_flops(kind, dtype) == tera * 1e12


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA L40S", "bfloat16"),
    ],
)
def test_no_peak_is_guessed(kind: str, dtype: str) -> None:
    assert peak_flops(kind, dtype) is None


def test_the_share_in_use_is_logged_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path: Path
) -> None:
    run = tiny(files, tmp_path, steps=2, eval_every=0, optimizer="sgd", options=())
    with opened(run) as trainer:
        assert trainer._peak_flops() is None  # of a CPU
        monkeypatch.setattr(train, "peak_flops", lambda kind, dtype: 2e9)
        assert trainer._peak_flops() == 2e9
        *_, last = trainer.train().records
        flops = last["tokens_per_second"] * trainer._flops_per_token()
        np.testing.assert_allclose(last["flop_utilisation"], flops / 2e9)
        trainer.run = dataclasses.replace(run, peak_flops=1e9)
        assert trainer._peak_flops() == 1e9
