"""The shape of an action expert, and the published `config.json` it is read from and written to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH, STATE_DIM
from rdt2_jax.config import FrozenConfig, PositiveInt, load_config, parse_config
from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import TextConfig

CONFIG_FILE = "config.json"

PRESETS = ("rdt2", "tiny")
"""Names that `preset` knows; the files are `configs/model/action_expert_<name>.yaml`."""

LayerIndex = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class ActionExpertConfig(FrozenConfig):
    """The expert of RDT2-FM; defaults as published. Hashable: a static argument of jit.

    Attributes:
        hidden_size: width.
        num_layers: blocks of self-attention, cross-attention and MLP.
        num_heads: query heads, of both kinds of attention.
        num_kv_heads: key heads; the backbone's, since cross-attention takes its keys and values as they are.
        num_registers: tokens behind the actions that are thrown away at the end.
        chunk_length: frames of a chunk.
        action_dim: numbers of a frame.
        state_dim: numbers of the proprioceptive state.
        mlp_multiple_of: the MLP's width, 2/3 of four times `hidden_size`, is rounded up to a multiple of this.
        mlp_multiplier: factor of that width before rounding; None: 1.
        norm_eps: epsilon of the RMSNorms.
        num_steps: Euler steps from noise to actions, where the caller does not say.
        condition_layers: backbone layers whose keys and values are read; block i reads the i-th of them, and where
            there are fewer than blocks, they repeat. Empty: layers 0 .. num_layers - 1.
    """

    hidden_size: PositiveInt = 1024
    num_layers: PositiveInt = 14
    num_heads: PositiveInt = 8
    num_kv_heads: PositiveInt = 4
    num_registers: PositiveInt = 4
    chunk_length: PositiveInt = CHUNK_LENGTH
    action_dim: PositiveInt = ACTION_DIM
    state_dim: PositiveInt = STATE_DIM
    mlp_multiple_of: PositiveInt = 256
    mlp_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    num_steps: PositiveInt = 5
    condition_layers: tuple[LayerIndex, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _all_layers(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("condition_layers"):
            count = values.get("num_layers", cls.model_fields["num_layers"].default)
            if isinstance(count, int) and 0 < count < 1000:  # else the field's own check speaks
                return {**values, "condition_layers": tuple(range(count))}
        return values

    @model_validator(mode="after")
    def _divisible(self) -> ActionExpertConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even: positions are sines and cosines")
        if len(self.condition_layers) > self.num_layers:
            raise ValueError(
                f"{len(self.condition_layers)} condition_layers for {self.num_layers} blocks: the last are never read"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the gated MLP (the rounding is that of the published code)."""
        size = int(2 * 4 * self.hidden_size / 3)
        if self.mlp_multiplier is not None:
            size = int(self.mlp_multiplier * size)
        return -(-size // self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def num_tokens(self) -> int:
        """Actions and registers."""
        return self.chunk_length + self.num_registers

    @property
    def num_backbone_layers(self) -> int:
        """How many of the backbone's first layers have to run."""
        return 1 + max(self.condition_layers)

    def check_backbone(self, text: TextConfig) -> None:
        """Verifies that the expert can read a backbone's keys and values.

        Raises:
            ConfigError: names every size that differs.
        """
        problems = Problems()
        for name, ours, theirs in (
            ("num_kv_heads", self.num_kv_heads, text.num_kv_heads),
            ("head_dim", self.head_dim, text.head_dim),
        ):
            if ours != theirs:
                problems.add(f"{name}: the expert has {ours}, the backbone {theirs}")
        if self.num_backbone_layers > text.num_layers:
            problems.add(f"the expert reads {self.num_backbone_layers} layers, the backbone has {text.num_layers}")
        problems.raise_if_any(ConfigError, "the action expert does not belong to this backbone")


def preset(name: str) -> ActionExpertConfig:
    """A configuration by name: "rdt2" as published, "tiny" for tests and experiments.

    Raises:
        ConfigError: another name.
    """
    if name not in PRESETS:
        raise ConfigError("no such preset of the action expert", expected=", ".join(PRESETS), found=name)
    return load_config(ActionExpertConfig, f"model/action_expert_{name}.yaml")


def read_config(path: str | Path) -> ActionExpertConfig:
    """Reads a published `config.json`, or that of a folder.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        ConfigError: unknown or missing keys, or another architecture than the published one.
    """
    file = Path(path) / CONFIG_FILE if Path(path).is_dir() else Path(path)
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            "no configuration of an action expert",
            where=file,
            found=error.strerror,
            fix="give a folder with config.json and model.safetensors or pytorch_model.bin",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not a JSON file", where=file, found=str(error)) from error
    if not isinstance(published, dict) or "rdt" not in published:
        found = ", ".join(list(published)[:8]) if isinstance(published, dict) else type(published).__name__
        raise CheckpointError(
            "not the configuration of an action expert",
            where=file,
            expected="a JSON object with a section rdt",
            found=found,
            fix="name the folder of RDT2-FM or of a distilled expert",
        )
    return parse_config(_PublishedConfig, published, where=str(file)).to_config()


def published_config(config: ActionExpertConfig) -> str:
    """The content of `config.json` as the published code writes it, so that it loads there too.

    Backbone layers other than the first ones are not part of the published file; where there are such, they stand
    under `selected_layers`, the name they have in the published training configuration.
    """
    published: dict[str, Any] = {
        "act_adaptor": "mlp3x_silu",
        "act_pos_emb_config": [["action", config.chunk_length], ["register", config.num_registers]],
        "action_dim": config.action_dim,
        "img_pos_emb_config": None,
        "img_token_dim": None,
        "lang_pos_emb_config": None,
        "lang_token_dim": None,
        "max_img_len": None,
        "max_lang_len": None,
        "noise_scheduler": {"num_inference_timesteps": config.num_steps},
        "pred_horizon": config.chunk_length,
        "rdt": {
            "depth": config.num_layers,
            "ffn_dim_multiplier": config.mlp_multiplier,
            "hidden_size": config.hidden_size,
            "multiple_of": config.mlp_multiple_of,
            "norm_eps": config.norm_eps,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "num_register_tokens": config.num_registers,
            "use_flash_attn": True,
        },
        "state_adaptor": "mlp3x_silu",
        "state_dim": config.state_dim,
    }
    if config.condition_layers != tuple(range(config.num_layers)):
        published["selected_layers"] = list(config.condition_layers)
    return json.dumps(published, indent=2) + "\n"


class _PublishedNetwork(FrozenConfig):
    hidden_size: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    num_register_tokens: PositiveInt = 4
    multiple_of: PositiveInt = 256
    ffn_dim_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    use_flash_attn: bool = True


class _PublishedScheduler(FrozenConfig):
    num_inference_timesteps: PositiveInt = 5


class _PublishedConfig(FrozenConfig):
    """The published file's own keys; anything else in it is refused by name."""

    rdt: _PublishedNetwork
    act_adaptor: Literal["mlp3x_silu"] = "mlp3x_silu"
    state_adaptor: Literal["mlp3x_silu"] = "mlp3x_silu"
    act_pos_emb_config: tuple[tuple[str, int], ...] | None = None
    action_dim: PositiveInt = ACTION_DIM
    state_dim: PositiveInt = STATE_DIM
    pred_horizon: PositiveInt = CHUNK_LENGTH
    noise_scheduler: _PublishedScheduler = _PublishedScheduler()
    selected_layers: tuple[LayerIndex, ...] = ()
    # An expert that embeds language and images itself was never published: it reads the backbone's keys and values.
    img_adaptor: None = None
    img_token_dim: None = None
    img_pos_emb_config: None = None
    max_img_len: None = None
    lang_adaptor: None = None
    lang_token_dim: None = None
    lang_pos_emb_config: None = None
    max_lang_len: None = None

    @model_validator(mode="after")
    def _consistent(self) -> _PublishedConfig:
        expected = (("action", self.pred_horizon), ("register", self.rdt.num_register_tokens))
        if self.act_pos_emb_config not in (None, expected):
            raise ValueError(f"act_pos_emb_config must be {expected}, found {self.act_pos_emb_config}")
        return self

    def to_config(self) -> ActionExpertConfig:
        return ActionExpertConfig(
            hidden_size=self.rdt.hidden_size,
            num_layers=self.rdt.depth,
            num_heads=self.rdt.num_heads,
            num_kv_heads=self.rdt.num_kv_heads,
            num_registers=self.rdt.num_register_tokens,
            chunk_length=self.pred_horizon,
            action_dim=self.action_dim,
            state_dim=self.state_dim,
            mlp_multiple_of=self.rdt.multiple_of,
            mlp_multiplier=self.rdt.ffn_dim_multiplier,
            norm_eps=self.rdt.norm_eps,
            num_steps=self.noise_scheduler.num_inference_timesteps,
            condition_layers=self.selected_layers,
        )
