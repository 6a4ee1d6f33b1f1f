"""The shape of a Qwen2.5-VL model, and the published `config.json` it is read from and written to.

Two layouts are published: the flat one of transformers 4.x (text fields at the top level, `rope_scaling`, `in_chans`)
and the nested one of 5.x (`text_config`, `rope_parameters`, `in_channels`). Both are read; the nested one is written,
and it reads back the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rdt2_jax.config import FrozenConfig, PositiveInt, load_config, parse_config
from rdt2_jax.errors import ConfigError

CONFIG_FILE = "config.json"

MODEL_TYPE = "qwen2_5_vl"

PRESETS = ("7b", "3b", "tiny")
"""Names that `preset` knows; the files are `configs/model/qwen2_5_vl_<name>.yaml`."""

Epsilon = Annotated[float, Field(gt=0.0)]
TokenId = Annotated[int, Field(ge=0)]


class VisionConfig(FrozenConfig):
    """The vision tower: a transformer over patches, most of whose blocks attend within windows.

    Attributes:
        depth: blocks.
        hidden_size: width.
        num_heads: attention heads.
        intermediate_size: width of the gated MLP.
        out_hidden_size: width of the decoder that reads the result.
        full_attention_blocks: blocks that attend over the whole image. They end groups of equal length (published:
            7, 15, 23, 31 of 32), so that the groups can be scanned.
        patch_size: pixels along a patch's side.
        temporal_patch_size: frames in a patch; a still image is repeated.
        spatial_merge_size: patches along the side of the square that becomes one token.
        window_size: pixels along a window's side.
        in_channels: colours.
        norm_eps: epsilon of the RMSNorms. The published files do not say it; the published code uses 1e-6.
        rope_theta: base of the rotary frequencies.
    """

    depth: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    intermediate_size: PositiveInt
    out_hidden_size: PositiveInt
    full_attention_blocks: tuple[int, ...]
    patch_size: PositiveInt = 14
    temporal_patch_size: PositiveInt = 2
    spatial_merge_size: PositiveInt = 2
    window_size: PositiveInt = 112
    in_channels: PositiveInt = 3
    norm_eps: Epsilon = 1e-6
    rope_theta: Epsilon = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Tokens along the side of a window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)

    @property
    def window_patches(self) -> int:
        """Patches in a whole window."""
        return self.window_tokens**2 * self.merge_unit

    @property
    def num_groups(self) -> int:
        """Groups of blocks, each ended by one with full attention."""
        return len(self.full_attention_blocks)

    @property
    def group_size(self) -> int:
        """Blocks in a group."""
        return self.depth // self.num_groups

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 4:
            raise ValueError(
                f"head_dim {self.head_dim} must be a multiple of 4: half of it turns by row, half by column"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(
                f"window_size {self.window_size} is not a multiple of patch_size * spatial_merge_size "
                f"({self.patch_size} * {self.spatial_merge_size})"
            )
        groups = len(self.full_attention_blocks)
        size = self.depth // groups if groups and self.depth % groups == 0 else 0
        expected = tuple(size * (i + 1) - 1 for i in range(groups))
        if not size or self.full_attention_blocks != expected:
            raise ValueError(
                f"full_attention_blocks {self.full_attention_blocks} must end groups of equal length in {self.depth} "
                "blocks, such as (7, 15, 23, 31) in 32"
            )
        return self


class TextConfig(FrozenConfig):
    """The decoder: grouped-query attention with multimodal rotary positions, RMSNorm, gated MLP.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
        intermediate_size: width of the gated MLP.
        mrope_sections: how many of the head_dim / 2 rotary frequencies turn by time, by row and by column.
        tie_embeddings: the output projection is the embedding itself.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the RMSNorms.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    intermediate_size: PositiveInt
    mrope_sections: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 24, 24)
    tie_embeddings: bool = False
    rope_theta: Epsilon = 1000000.0
    norm_eps: Epsilon = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _consistent(self) -> TextConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ValueError(
                f"mrope_sections {self.mrope_sections} must sum to half of head_dim, {self.head_dim} / 2 "
                "(head_dim = hidden_size / num_heads)"
            )
        return self


class Qwen25VLConfig(FrozenConfig):
    """A whole model. Hashable: a static argument of jit.

    Attributes:
        vision: the vision tower.
        text: the decoder.
        image_token_id: stands where an image's tokens go.
        video_token_id: stands where a video's tokens would go; not supported, and refused.
        vision_start_token_id, vision_end_token_id: around the image tokens.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: TokenId = 151655
    video_token_id: TokenId = 151656
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653

    @model_validator(mode="after")
    def _consistent(self) -> Qwen25VLConfig:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision.out_hidden_size {self.vision.out_hidden_size} must be text.hidden_size {self.text.hidden_size}"
            )
        return self

    def with_layers(self, num_layers: int) -> Qwen25VLConfig:
        """The same model with only its first decoder layers.

        Raises:
            ConfigError: fewer than 1 or more than there are.
        """
        if not 1 <= num_layers <= self.text.num_layers:
            raise ConfigError(
                "a model cannot have so many layers",
                where="num_layers",
                expected=f"1 to {self.text.num_layers}",
                found=num_layers,
            )
        return self.model_copy(update={"text": self.text.model_copy(update={"num_layers": num_layers})})


def preset(name: str) -> Qwen25VLConfig:
    """A configuration by name: "7b" and "3b" as published, "tiny" for tests and experiments.

    Raises:
        ConfigError: another name.
    """
    if name not in PRESETS:
        raise ConfigError("no such preset of Qwen2.5-VL", expected=", ".join(PRESETS), found=name)
    return load_config(Qwen25VLConfig, f"model/qwen2_5_vl_{name}.yaml")


def read_config(path: str | Path) -> Qwen25VLConfig:
    """Reads a published `config.json`, or that of a folder.

    Raises:
        ConfigError: there is no such file, it is not JSON, not a Qwen2.5-VL, or lacks a field; names file and field.
    """
    path = Path(path)
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "a model needs its config.json", where=file, fix="copy it from where the weights came from"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError("a config.json that cannot be read", where=file, found=str(error)) from error
    return from_published(published, where=str(file))


def from_published(published: Mapping[str, Any], where: str = CONFIG_FILE) -> Qwen25VLConfig:
    """The configuration that a published `config.json`, flat or nested, describes.

    Raises:
        ConfigError: not a Qwen2.5-VL, a field is missing, or the file asks for something this port does not do.
    """
    reader = _Reader(published, where)
    if reader.get(("model_type",)) != MODEL_TYPE:
        raise ConfigError(
            "not the configuration of a Qwen2.5-VL", where=where, expected=MODEL_TYPE, found=published.get("model_type")
        )
    text: tuple[str, ...] = ("text_config",) if isinstance(published.get("text_config"), Mapping) else ()
    rope = next((k for k in ("rope_parameters", "rope_scaling") if reader.find((*text, k)) is not None), "rope_scaling")
    # older files say "mrope" for what newer ones call the default; anything else scales the positions
    reader.demand((*text, rope, "rope_type"), "default", "mrope")
    reader.demand((*text, rope, "type"), "default", "mrope")
    reader.demand(("vision_config", "rope_parameters", "rope_type"), "axial")
    for path in ((*text, "head_dim"), ("vision_config", "head_dim")):
        heads = "num_heads" if path[0] == "vision_config" else "num_attention_heads"
        reader.demand(path, int(reader.get((*path[:-1], "hidden_size"))) // int(reader.get((*path[:-1], heads))))
    reader.demand((*text, "hidden_act"), "silu")
    reader.demand((*text, "use_sliding_window"), False)
    reader.demand(("vision_config", "hidden_act"), "silu")
    # transformers writes the flag beside the text fields, and older files at the top alone
    tied = reader.find(("tie_word_embeddings",), reader.find((*text, "tie_word_embeddings"), False))
    config = {
        "vision": {
            "depth": reader.get(("vision_config", "depth")),
            "hidden_size": reader.get(("vision_config", "hidden_size")),
            "num_heads": reader.get(("vision_config", "num_heads")),
            "intermediate_size": reader.get(("vision_config", "intermediate_size")),
            "out_hidden_size": reader.get(("vision_config", "out_hidden_size")),
            "full_attention_blocks": reader.get(("vision_config", "fullatt_block_indexes")),
            "in_channels": reader.find(("vision_config", "in_channels"), reader.find(("vision_config", "in_chans"), 3)),
            "patch_size": reader.find(("vision_config", "patch_size"), 14),
            "temporal_patch_size": reader.find(("vision_config", "temporal_patch_size"), 2),
            "spatial_merge_size": reader.find(("vision_config", "spatial_merge_size"), 2),
            "window_size": reader.find(("vision_config", "window_size"), 112),
            "rope_theta": reader.find(("vision_config", "rope_parameters", "rope_theta"), 10000.0),
        },
        "text": {
            "vocab_size": reader.get((*text, "vocab_size")),
            "hidden_size": reader.get((*text, "hidden_size")),
            "num_layers": reader.get((*text, "num_hidden_layers")),
            "num_heads": reader.get((*text, "num_attention_heads")),
            "num_kv_heads": reader.get((*text, "num_key_value_heads")),
            "intermediate_size": reader.get((*text, "intermediate_size")),
            "mrope_sections": reader.get((*text, rope, "mrope_section")),
            "rope_theta": reader.find((*text, rope, "rope_theta"), reader.find((*text, "rope_theta"), 1000000.0)),
            "norm_eps": reader.get((*text, "rms_norm_eps")),
            "tie_embeddings": tied,
        },
        "image_token_id": reader.get(("image_token_id",)),
        "video_token_id": reader.get(("video_token_id",)),
        "vision_start_token_id": reader.get(("vision_start_token_id",)),
        "vision_end_token_id": reader.find(("vision_end_token_id",), 151653),
    }
    return parse_config(Qwen25VLConfig, config, where=where)


def to_published(config: Qwen25VLConfig, dtype: str = "float32") -> dict[str, Any]:
    """The nested `config.json` that transformers 5.x reads, and `from_published` too.

    Args:
        config: the model.
        dtype: of the weights, as torch names it.

    Raises:
        ConfigError: the norms of the vision tower have an epsilon that the published layout cannot say.
    """
    vision, text = config.vision, config.text
    if vision.norm_eps != 1e-6:
        raise ConfigError(
            "the published layout has no place for this epsilon",
            where="vision.norm_eps",
            expected=1e-6,
            found=vision.norm_eps,
        )
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "tie_word_embeddings": text.tie_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": {
            "model_type": f"{MODEL_TYPE}_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": text.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_sections),
            },
            "tie_word_embeddings": text.tie_embeddings,
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": f"{MODEL_TYPE}_vision",
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": vision.out_hidden_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "window_size": vision.window_size,
            "in_channels": vision.in_channels,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        },
    }


class _Reader:
    """Fields of a nested dictionary by path, with errors that name them."""

    def __init__(self, published: Mapping[str, Any], where: str) -> None:
        self._published, self._where = published, where

    def find(self, path: tuple[str, ...], default: Any = None) -> Any:
        """A field, or the default where it is missing or null."""
        value: Any = self._published
        for key in path:
            if not isinstance(value, Mapping):
                return default
            value = value.get(key)
        return default if value is None else value

    def get(self, path: tuple[str, ...]) -> Any:
        """A field that must be there."""
        value = self.find(path)
        if value is None:
            raise ConfigError("a field is missing", where=self._where, expected=".".join(path))
        return value

    def demand(self, path: tuple[str, ...], *allowed: Any) -> None:
        """Refuses all but some values of a field that may be missing."""
        value = self.find(path, allowed[0])
        if value not in allowed:
            raise ConfigError(
                "this port does not do that",
                where=f"{self._where}: {'.'.join(path)}",
                expected=" or ".join(map(str, allowed)),
                found=value,
            )
