"""Peak arithmetic rates of accelerators, for shares of them. What a machine really does is measured, not looked up.

Operations per second of dense matrix products in bfloat16 with sums in float32, without structured sparsity, as the
makers state them. Variants that differ in power or clock are told apart where their names tell; a name that is not in
the table has no rate here, rather than that of a relative.
"""

from __future__ import annotations

import re

_PEAKS: tuple[tuple[str, float], ...] = (
    # Google Cloud TPU documentation, "system architecture" pages of each generation, per chip (a jax device)
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    # NVIDIA A100 data sheet; both sizes, both forms
    (r"NVIDIA A100.*", 312e12),
    # NVIDIA H100 data sheet, halved from the figures "with sparsity": PCIe, NVL, SXM
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 NVL", 835e12),
    (r"NVIDIA H100 (80GB HBM3|SXM.*)", 989e12),
    # NVIDIA H200 data sheet, halved likewise: NVL, SXM. GH200's data sheet gives the same rate as SXM
    (r"NVIDIA H200 NVL", 835e12),
    (r"NVIDIA H200( SXM.*)?", 989e12),
    (r"NVIDIA GH200.*", 989e12),
    # NVIDIA B200: DGX B200 data sheet, an eighth of the system's rate, halved from "with sparsity"
    (r"NVIDIA B200", 2250e12),
    # NVIDIA L4 and L40S data sheets, L4 halved from "with sparsity"
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40S", 362e12),
    # NVIDIA Ada and RTX Blackwell architecture white papers, "bf16 tensor with fp32 accumulate"
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 5090", 209.5e12),
)


def peak_flops_per_s(device_kind: str) -> float | None:
    """Peak rate of one device in bfloat16, or None where it is not known.

    Args:
        device_kind: `jax.Device.device_kind`. A slice of a GPU (MIG) is not the GPU, and not known.
    """
    if "MIG" in device_kind:
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_kind)), None)
