"""What the configurations of all stages that train on shards have in common."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator
from rdt2_data.augment.config import AugmentConfig

from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute, Remat, default_compute
from rdt2_jax.sharding import Layout, make_mesh
from rdt2_train.loop import LoopConfig
from rdt2_train.optimizer import OptimizerConfig, StepsConfig


class MeshConfig(FrozenConfig):
    """Devices of all processes as data x fsdp x tensor; at most one -1 takes what is left.

    Attributes:
        data: copies of the parameters, each with its part of the batch.
        fsdp: parameters and optimizer are spread over so many devices, each with its part of the batch.
        tensor: layers are split over so many devices.
        devices: use so many of this machine's devices, the first; None: all of all processes.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: PositiveInt | None = None

    def layout(self) -> Layout:
        """The mesh over all devices.

        Raises:
            ConfigError: sizes that do not multiply to the number of devices.
        """
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        devices = jax.devices()[: self.devices]
        count = len(devices)
        open_axes = [name for name, size in sizes.items() if size == -1]
        known = 1
        for size in sizes.values():
            known *= 1 if size == -1 else size
        if len(open_axes) > 1 or known < 1 or count % known or (not open_axes and known != count):
            raise ConfigError(
                "the mesh does not fit the devices",
                where="mesh",
                expected=f"sizes whose product is {count}, at most one of them -1",
                found=sizes,
            )
        for name in open_axes:
            sizes[name] = count // known
        return Layout(make_mesh(sizes, devices))


class ComputeConfig(FrozenConfig):
    """How networks are computed.

    Attributes:
        dtype: of activations; "auto": bfloat16 on accelerators, float32 on CPUs. Trained parameters, gradients and the
            optimizer are float32 in any case.
        remat: what the backward pass computes again.
    """

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    remat: Remat = "none"

    def compute(self, layout: Layout) -> Compute:
        """As the networks take it."""
        chosen = default_compute(remat=self.remat, layout=layout)
        if self.dtype == "auto":
            return chosen
        return default_compute(dtype=jnp.dtype(self.dtype), remat=self.remat, layout=layout)


class DataConfig(FrozenConfig):
    """What is trained on.

    Attributes:
        dataset: file of a dataset or mixture, see `rdt2_data.dataset_config`.
        held_out: file of a dataset to evaluate on; None: no evaluation.
        text_length: ids in a row.
        max_supervised: of them, ids that are learnt; an action has 33.
        augment: of the images; None: none.
        threads, prefetch: of the stream.
        strict: stop at the first bad sample.
    """

    dataset: str
    held_out: str | None = None
    text_length: PositiveInt = 480
    max_supervised: PositiveInt = 64
    augment: AugmentConfig | None = None
    threads: PositiveInt = 4
    prefetch: PositiveInt = 4
    strict: bool = False


class RunConfig(FrozenConfig):
    """What all these stages have in common.

    Attributes:
        model: folder or hub name of the backbone.
        data: see there.
        batch_size: samples of a step, over all devices.
        optimizer: see there.
        loop: steps, checkpoints, log.
        mesh, compute: see there.
        seed: of initial values, of the data and of all that is drawn.
    """

    model: str
    data: DataConfig
    batch_size: PositiveInt
    optimizer: OptimizerConfig
    loop: LoopConfig
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def steps(self) -> StepsConfig:
        """Steps and optimizer together."""
        return StepsConfig(steps=self.loop.steps, optimizer=self.optimizer)

    @model_validator(mode="after")
    def _schedule_fits(self) -> RunConfig:
        StepsConfig(steps=self.loop.steps, optimizer=self.optimizer)
        return self
