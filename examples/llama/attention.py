# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention: XLA's, which writes out scores, or cuDNN's fused.

    "xla"     any device, any dtype
    "cudnn"   NVIDIA GPUs from compute capability 8.0 on, 16-bit activations
    "auto"    cudnn where it runs, else xla

The names are those of `jax.nn.dot_product_attention`'s `implementation`.
"""

import functools

import jax
import jax.numpy as jnp

CHOICES = ("auto", "xla", "cudnn")
_SIXTEEN_BITS = ("bfloat16", "float16")
_CAPABILITY = 8.0


def check(choice: str, compute: str) -> None:
    """Refuses what no device can do.

    Raises:
      ValueError: no such choice, or cuDNN's kernel for activations of 32 bits.
    """
    if choice not in CHOICES:
        known = ", ".join(CHOICES)
        raise ValueError(f"unknown attention={choice!r}; known: {known}.")
    if choice == "cudnn" and compute not in _SIXTEEN_BITS:
        raise ValueError(
            f"attention=cudnn with compute_dtype={compute}: cuDNN's kernel takes 16-bit"
            " activations. Add compute_dtype=bfloat16, or take attention=auto."
        )


def implementation(choice: str, compute: str, head_size: int) -> str:
    """`choice` on the device at hand, "xla" or "cudnn".

    Raises:
      ValueError: cuDNN's kernel was chosen where it cannot run; why is said.
    """
    check(choice, compute)
    if choice == "xla" or (choice == "auto" and compute not in _SIXTEEN_BITS):
        return "xla"
    obstacle = _obstacle(compute, head_size)
    if choice == "cudnn" and obstacle:
        raise ValueError(f"attention=cudnn: {obstacle}. Take attention=auto or xla.")
    return "xla" if obstacle else "cudnn"


def _obstacle(compute: str, head_size: int) -> str:
    """Why cuDNN's kernel cannot run here; empty where it can."""
    device = jax.devices()[0]
    found = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not found.replace(".", "").isdigit():
        return f"the device is no NVIDIA GPU but {device.device_kind!r}"
    if float(found) < _CAPABILITY:
        return f"{device.device_kind} has compute capability {found}, below 8.0"
    return _refusal(compute, head_size)


def _refusal(compute: str, head_size: int) -> str:
    """JAX's own objection to heads of this size, or to the cuDNN it finds."""
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    one = jax.ShapeDtypeStruct((1, 8, 1, head_size), jnp.dtype(compute))
    try:
        jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[0], one, one, one)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).rstrip(".")
    return ""
