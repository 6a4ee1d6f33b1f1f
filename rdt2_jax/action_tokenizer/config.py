"""The shape of an RVQ action tokenizer, and the published `config.json` it is read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH, GROUP_CHANNELS, GROUP_NAMES, GroupName
from rdt2_jax.config import FrozenConfig, PositiveInt, parse_config
from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.io.files import atomic_write

DOWNSAMPLING_STAGES = 3
DOWNSAMPLING = 2**DOWNSAMPLING_STAGES
"""Frames per latent: three stages of stride 2."""

CHANNEL_MULTIPLIERS = (2, 4, 8)
"""Width of each encoder stage in units of `hidden_size`."""

NumCodes = Annotated[int, Field(ge=2, le=32768)]
"""Tokens are stored as int16."""

Cost = Annotated[float, Field(ge=0.0)]


class Levels(FrozenConfig):
    """Residual quantization levels of each channel group; the published default is (6, 2, 1)."""

    pos: PositiveInt = 6
    rot: PositiveInt = 2
    grip: PositiveInt = 1


class ActionTokenizerConfig(FrozenConfig):
    """Shape and loss weights of the three VQ-VAEs (positions, rotations, widths).

    Attributes:
        hidden_size: base width of the convolutional networks.
        latent_size: channels of a latent step (`cnn_config.output_size` in the published file).
        embedding_dim: width in which codes are compared.
        num_codes: codes in each codebook (`num_embeddings`).
        levels: codebooks per channel group (`n_codebooks`).
        chunk_length: frames in a chunk (`action_horizon`), a multiple of 8.
        restart_interval: training steps after which codes that were never hit are restarted.
        commitment_cost: weight of the commitment loss.
        codebook_cost: weight of the reported codebook loss; it has no gradient, codebooks move by EMA.
        ema_decay: decay of the codebooks' exponential moving averages.
        ema_epsilon: Laplace smoothing of the cluster sizes.
        rotation_loss: "geodesic" is the published one, the angle itself; "chordal" is its square to first order, which
            leaves no plateau where only some axes are learnt (see docs/tokenizer.md). Matters in training alone.
    """

    hidden_size: PositiveInt
    latent_size: PositiveInt
    embedding_dim: PositiveInt
    num_codes: NumCodes = 1024
    levels: Levels = Levels()
    chunk_length: PositiveInt = CHUNK_LENGTH
    restart_interval: PositiveInt = 64
    commitment_cost: Cost = 0.25
    codebook_cost: Cost = 0.0
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    ema_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    rotation_loss: Literal["geodesic", "chordal"] = "geodesic"

    @model_validator(mode="after")
    def _whole_latents(self) -> ActionTokenizerConfig:
        if self.chunk_length % DOWNSAMPLING:
            raise ValueError(f"chunk_length must be a multiple of {DOWNSAMPLING}, found {self.chunk_length}")
        return self

    @property
    def num_latents(self) -> int:
        """Latent steps per chunk."""
        return self.chunk_length // DOWNSAMPLING

    @property
    def num_tokens(self) -> int:
        """Tokens per chunk, all groups together."""
        return self.num_latents * sum(getattr(self.levels, group) for group in GROUP_NAMES)

    def num_levels(self, group: GroupName) -> int:
        """Codebooks of one channel group."""
        return getattr(self.levels, group)

    def token_slice(self, group: GroupName) -> slice:
        """Where a group's tokens stand in the sequence (positions, then rotations, then widths)."""
        start = 0
        for name in GROUP_NAMES:
            length = self.num_latents * self.num_levels(name)
            if name == group:
                return slice(start, start + length)
            start += length
        raise ConfigError("unknown channel group", expected=", ".join(GROUP_NAMES), found=group)


_IGNORED_KEYS = {"local_rank": "a launcher's rank, not a property of the model"}


def read_published_config(path: Path) -> ActionTokenizerConfig:
    """Reads the `config.json` of a published tokenizer checkpoint.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        ConfigError: unknown or missing keys, values out of range, or channel groups other than the published ones.
    """
    try:
        published = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            "no tokenizer configuration",
            where=path,
            found=error.strerror,
            fix="give a directory with config.json and model.safetensors",
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError("not a JSON file", where=path, found=str(error)) from error
    if not isinstance(published, dict):
        raise CheckpointError("not a tokenizer configuration", where=path, expected="a JSON object", found=published)
    return parse_config(_PublishedConfig, published, where=str(path)).to_config()


def write_published_config(config: ActionTokenizerConfig, path: Path) -> None:
    """Writes `config.json` as the published code writes it, so that it loads there too."""
    published = {
        "action_horizon": config.chunk_length,
        "cnn_config": {"dropout": 0.0, "hidden_size": config.hidden_size, "output_size": config.latent_size},
        "codebook_cost": config.codebook_cost,
        "codebook_restart_interval": config.restart_interval,
        "commitment_cost": config.commitment_cost,
        "embedding_dim": config.embedding_dim,
        "input_dim": {group: len(GROUP_CHANNELS[group]) for group in GROUP_NAMES},
        "n_codebooks": config.levels.model_dump(),
        "num_embeddings": config.num_codes,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(published, indent=2) + "\n").encode())


class _PublishedCnn(FrozenConfig):
    hidden_size: PositiveInt
    output_size: PositiveInt
    dropout: float = 0.0


class _PublishedInputDim(FrozenConfig):
    pos: int = len(GROUP_CHANNELS["pos"])
    rot: int = len(GROUP_CHANNELS["rot"])
    grip: int = len(GROUP_CHANNELS["grip"])


class _PublishedConfig(FrozenConfig):
    """The published file's own keys; anything else in it is refused by name."""

    cnn_config: _PublishedCnn
    embedding_dim: PositiveInt
    num_embeddings: NumCodes
    n_codebooks: Levels = Levels()
    input_dim: _PublishedInputDim = _PublishedInputDim()
    action_horizon: PositiveInt = CHUNK_LENGTH
    codebook_restart_interval: PositiveInt = 64
    commitment_cost: Cost = 0.25
    codebook_cost: Cost = 0.0

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if k not in _IGNORED_KEYS} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _published_shape(self) -> _PublishedConfig:
        if self.action_horizon % DOWNSAMPLING:
            raise ValueError(f"action_horizon must be a multiple of {DOWNSAMPLING}, found {self.action_horizon}")
        found = self.input_dim.pos + self.input_dim.rot + self.input_dim.grip
        if self.input_dim != _PublishedInputDim():
            raise ValueError(f"input_dim must be the published split of {ACTION_DIM} channels, found {found}")
        return self

    def to_config(self) -> ActionTokenizerConfig:
        return ActionTokenizerConfig(
            hidden_size=self.cnn_config.hidden_size,
            latent_size=self.cnn_config.output_size,
            embedding_dim=self.embedding_dim,
            num_codes=self.num_embeddings,
            levels=self.n_codebooks,
            chunk_length=self.action_horizon,
            restart_interval=self.codebook_restart_interval,
            commitment_cost=self.commitment_cost,
            codebook_cost=self.codebook_cost,
        )
