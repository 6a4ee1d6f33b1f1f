"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rdt2_jax.params import ParamSpec, ones


def norm_specs(width: int, dtype: Any = jnp.float32, axis: str | None = "embed") -> ParamSpec:
    """The scale of a norm."""
    return ParamSpec((width,), (axis,), ones, dtype)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis.

    The mean and the division are computed in float32, the product with `scale` in the dtype of `x`, as the published
    models do it.
    """
    wide = x.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normalized.astype(x.dtype) * scale.astype(x.dtype)
