# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations per second of known accelerators, at their best.

Of dense products, accumulated in f32, from the vendors' data sheets: NVIDIA A100, H100,
H200, L4, T4 and V100 Tensor Core GPU data sheets, the Ampere GA102 and Ada whitepapers
(GeForce), Google Cloud's TPU system architecture pages. Where a sheet prints a figure
with sparsity, this is half of it.

In f32 what counts is how JAX multiplies f32 by default: in TF32 on NVIDIA GPUs since
Ampere, in one pass of bf16 on TPUs.
"""

import re

_TERA = 1e12


def _nvidia(sixteen: float, tf32: float) -> dict[str, float]:
    return {"bfloat16": sixteen, "float16": sixteen, "float32": tf32}


def _tpu(bf16: float) -> dict[str, float]:
    return {"bfloat16": bf16, "float32": bf16}


# By a pattern of `device.device_kind`, TFLOP/s by dtype. A dtype without units of its
# own is left out.
_KNOWN: dict[str, dict[str, float]] = {
    r"NVIDIA A100.*": _nvidia(312, 156),
    r"NVIDIA H100 PCIe": _nvidia(756, 378),
    r"NVIDIA H[12]00 NVL": _nvidia(835, 417),
    r"NVIDIA H100( 80GB HBM3)?": _nvidia(989, 494),
    r"NVIDIA H200": _nvidia(989, 494),
    r"NVIDIA GeForce RTX 3090": _nvidia(71, 35.6),
    r"NVIDIA GeForce RTX 4090": _nvidia(165.2, 82.6),
    r"NVIDIA L4": _nvidia(121, 60),
    r"(NVIDIA |Tesla )T4": {"float16": 65, "float32": 8.1},
    r"(NVIDIA |Tesla )V100-SXM2.*": {"float16": 125, "float32": 15.7},
    r"(NVIDIA |Tesla )V100-PCIE.*": {"float16": 112, "float32": 14},
    r"TPU v4": _tpu(275),
    r"TPU v5 ?(lite|e)": _tpu(197),
    r"TPU v5p?": _tpu(459),
    r"TPU v6 ?(lite|e)": _tpu(918),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Of one device, per second; `None` where it is not known.

    Args:
      device_kind: as JAX names it, `jax.devices()[0].device_kind`.
      dtype: of the operands of products.

    Example:
      >>> peak_flops("NVIDIA H200", "bfloat16")
      989000000000000.0
      >>> peak_flops("cpu", "float32")
    """
    for pattern, by_dtype in _KNOWN.items():
        if re.fullmatch(pattern, device_kind):
            found = by_dtype.get(dtype)
            return found * _TERA if found else None
    return None
