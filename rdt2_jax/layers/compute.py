"""How a network is computed, as opposed to what it computes: dtype, attention kernel, rematerialisation, layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.attention import AttentionBackend, default_backend
from rdt2_jax.sharding import Layout

Remat = Literal["none", "full", "dots"]
"""What the backward pass computes again: nothing; all but each layer's input; all but the products with weights."""

_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """Choices of the caller; hashable, a static argument of jit.

    Attributes:
        dtype: of activations. Norms, softmax and rotary angles are computed in float32 whatever it is.
        attention: which attention kernel.
        query_chunk: queries at a time, where the kernel works in chunks.
        remat: what the backward pass computes again.
        layout: mesh and rules by which activations are laid out; None: one device.
    """

    dtype: Any = jnp.float32
    attention: AttentionBackend = AttentionBackend.XLA
    query_chunk: int = 256
    remat: Remat = "none"
    layout: Layout | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.remat != "none" and self.remat not in _POLICIES:
            raise ConfigError("no such remat policy", expected=("none", *_POLICIES), found=self.remat)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Lays an activation out by logical axes, where there is a mesh."""
        return x if self.layout is None else self.layout.constrain(x, *axes)

    def rematerialized(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`body`, saving for its backward pass what `remat` says."""
        if self.remat == "none":
            return body
        return jax.checkpoint(body, policy=_POLICIES[self.remat])


def default_compute(platform: str | None = None, **choices: Any) -> Compute:
    """What suits a kind of device: bfloat16 on GPUs and TPUs, float32 on CPUs, and the attention kernel to match.

    Args:
        platform: `jax.Device.platform`; that of the default device if None.
        choices: fields of `Compute` to set otherwise.
    """
    platform = jax.default_backend() if platform is None else platform
    dtype = choices.pop("dtype", jnp.float32 if platform == "cpu" else jnp.bfloat16)
    choices.setdefault("attention", default_backend(platform, dtype))
    return Compute(dtype=dtype, **choices)
