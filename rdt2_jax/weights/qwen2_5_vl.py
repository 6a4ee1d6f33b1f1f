"""The published Qwen2.5-VL: names of its safetensors and the leaves they fill.

Older files say `visual.` and `model.`, newer ones `model.visual.` and `model.language_model.`; both are read, the
older names are written.
"""

from __future__ import annotations

from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from rdt2_jax.weights.ops import Op, Permute, Split, chain, identity, merge
from rdt2_jax.weights.table import Ignored, IndexMap, Row, Table

_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def qwen2_5_vl_table(
    config: Qwen25VLConfig, *, published_layers: int | None = None, vision: bool = True, with_head: bool = True
) -> Table:
    """The published layout.

    Args:
        config: the model that is filled; it may have only the first decoder layers.
        published_layers: decoder layers that the files have; those beyond `config.text.num_layers` are ignored.
        vision: the model has its vision tower; else its tensors are ignored.
        with_head: the model has final norm and output projection; else they are ignored.
    """
    text = config.text
    ignored: list[Ignored] = []
    total = text.num_layers if published_layers is None else published_layers
    if total > text.num_layers:
        beyond = {"i": range(text.num_layers, total)}
        ignored.append(Ignored("model.layers.{i}.*", f"only the first {text.num_layers} layers are wanted", beyond))
    if not vision:
        ignored.append(Ignored("visual.*", "the vision tower is not wanted"))
    if not with_head:
        ignored.append(Ignored("model.norm.weight", "only keys and values are wanted"))
    if not with_head or text.tie_embeddings:
        reason = "tied to the embedding" if text.tie_embeddings else "only keys and values are wanted"
        ignored.append(Ignored("lm_head.weight", reason))
    rows = (*(_vision_rows(config.vision) if vision else ()), *_text_rows(text))
    head = (Row("model.norm.weight", "text.norm"),) if with_head else ()
    if with_head and not text.tie_embeddings:
        head = (*head, Row("lm_head.weight", "text.head"))
    return Table("Qwen2.5-VL", (*rows, *head), tuple(ignored), prefixes=_PREFIXES)


def _text_rows(config: TextConfig) -> tuple[Row, ...]:
    source, leaf = "model.layers.{i}", "text.layers"
    heads = Split(0, (config.num_heads, config.head_dim))
    kv_heads = Split(0, (config.num_kv_heads, config.head_dim))
    joined_heads = Split(1, (config.num_heads, config.head_dim))
    projections = (("q", "query", heads), ("k", "key", kv_heads), ("v", "value", kv_heads))
    return (
        Row("model.embed_tokens.weight", "text.embedding"),
        Row(f"{source}.input_layernorm.weight", f"{leaf}.attention_norm"),
        *(
            row
            for short, name, split in projections
            for row in _linear(f"{source}.self_attn.{short}_proj", f"{leaf}.attention.{name}", split, split)
        ),
        Row(f"{source}.self_attn.o_proj.weight", f"{leaf}.attention.out.weight", joined_heads),
        Row(f"{source}.post_attention_layernorm.weight", f"{leaf}.mlp_norm"),
        *(Row(f"{source}.mlp.{part}_proj.weight", f"{leaf}.mlp.{part}.weight") for part in ("gate", "up", "down")),
    )


def _vision_rows(config: VisionConfig) -> tuple[Row, ...]:
    size = config.group_size
    windowed = [[first + i for i in range(size - 1)] for first in range(0, config.depth, size)]
    # the published convolution has its stride as its kernel: a matrix over whole patches
    window = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    return (
        Row("visual.patch_embed.proj.weight", "vision.patch.weight", merge(1, window)),
        *(_block_rows(config, "windowed", windowed) if size > 1 else ()),
        *_block_rows(config, "full", list(config.full_attention_blocks)),
        Row("visual.merger.ln_q.weight", "vision.merger.norm"),
        *_linear("visual.merger.mlp.0", "vision.merger.up"),
        *_linear("visual.merger.mlp.2", "vision.merger.down"),
    )


def _block_rows(config: VisionConfig, kind: str, blocks: IndexMap) -> tuple[Row, ...]:
    source, leaf = "visual.blocks.{i}", f"vision.blocks.{kind}"
    heads = config.num_heads, config.head_dim
    fused = chain(Split(0, (3, *heads)), Permute((1, 0, 2, 3)))
    fused_bias = chain(Split(0, (3, *heads)), Permute((1, 0, 2)))
    return (
        Row(f"{source}.norm1.weight", f"{leaf}.attention_norm", stacked={"i": blocks}),
        *_linear(f"{source}.attn.qkv", f"{leaf}.attention.qkv", fused, fused_bias, blocks),
        *_linear(f"{source}.attn.proj", f"{leaf}.attention.out", Split(1, heads), identity, blocks),
        Row(f"{source}.norm2.weight", f"{leaf}.mlp_norm", stacked={"i": blocks}),
        *(
            row
            for part in ("gate", "up", "down")
            for row in _linear(f"{source}.mlp.{part}_proj", f"{leaf}.mlp.{part}", blocks=blocks)
        ),
    )


def _linear(
    source: str, leaf: str, weight: Op = identity, bias: Op = identity, blocks: IndexMap | None = None
) -> tuple[Row, Row]:
    stacked = {} if blocks is None else {"i": blocks}
    return (
        Row(f"{source}.weight", f"{leaf}.weight", weight, stacked=stacked),
        Row(f"{source}.bias", f"{leaf}.bias", bias, stacked=stacked),
    )
