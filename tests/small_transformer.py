"""A transformer small enough for tests, with what makes real ones awkward: stacked layers, and blocks in groups.

Six vision blocks form two groups of three; the last of each group is of another kind and has its own leaves.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.params import ParamSpec, fan_in_uniform, normal, ones, stack
from rdt2_jax.weights.ops import fused_heads_out, heads_bias, heads_in, heads_out, transpose
from rdt2_jax.weights.table import Ignored, Row, Table

LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4, 16, 4, 2, 4, 24, 32
GROUPS, WINDOWED = 2, 2
WINDOWED_BLOCKS = ((0, 1), (3, 4))
FULL_BLOCKS = (2, 5)


@struct.dataclass
class Attention:
    q: Any
    q_bias: Any
    k: Any
    v: Any
    o: Any


@struct.dataclass
class Layer:
    norm: Any
    attention: Attention
    gate_up: Any
    down: Any


@struct.dataclass
class Block:
    qkv: Any
    norm: Any


@struct.dataclass
class Vision:
    windowed: Block
    full: Block


@struct.dataclass
class Transformer:
    embedding: Any
    layers: Layer
    vision: Vision
    head: Any


def transformer_specs(dtype: Any = jnp.float32, layers: int = LAYERS) -> Transformer:
    """The declaration of the whole model."""
    init = fan_in_uniform(EMBED)
    layer = Layer(
        norm=ParamSpec((EMBED,), ("embed",), ones, dtype),
        attention=Attention(
            q=ParamSpec((EMBED, HEADS, HEAD_DIM), ("embed", "heads", "head_dim"), init, dtype),
            q_bias=ParamSpec((HEADS, HEAD_DIM), ("heads", "head_dim"), init, dtype),
            k=ParamSpec((EMBED, KV_HEADS, HEAD_DIM), ("embed", "kv_heads", "head_dim"), init, dtype),
            v=ParamSpec((EMBED, KV_HEADS, HEAD_DIM), ("embed", "kv_heads", "head_dim"), init, dtype),
            o=ParamSpec((HEADS, HEAD_DIM, EMBED), ("heads", "head_dim", "embed"), init, dtype),
        ),
        gate_up=ParamSpec((2, EMBED, MLP), (None, "embed", "mlp"), init, dtype),
        down=ParamSpec((MLP, EMBED), ("mlp", "embed"), init, dtype),
    )
    block = Block(
        qkv=ParamSpec((3, EMBED, HEADS, HEAD_DIM), (None, "embed", "heads", "head_dim"), init, dtype),
        norm=ParamSpec((EMBED,), ("embed",), ones, dtype),
    )
    return Transformer(
        embedding=ParamSpec((VOCAB, EMBED), ("vocab", "embed"), normal(0.02), dtype),
        layers=stack(layer, layers),
        vision=Vision(windowed=stack(stack(block, WINDOWED, None), GROUPS, None), full=stack(block, GROUPS, None)),
        head=ParamSpec((EMBED, VOCAB), ("embed", "vocab"), normal(0.02), dtype),
    )


def _block_rows(kind: str, blocks: Any) -> tuple[Row, ...]:
    return (
        Row(
            "visual.blocks.{i}.attn.qkv.weight",
            f"vision.{kind}.qkv",
            fused_heads_out(3, HEADS, HEAD_DIM),
            stacked={"i": blocks},
        ),
        Row("visual.blocks.{i}.norm.weight", f"vision.{kind}.norm", stacked={"i": blocks}),
    )


def transformer_table(ignored: tuple[Ignored, ...] = ()) -> Table:
    """The published layout of the model."""
    layer = "model.layers.{i}"
    return Table(
        name="small transformer",
        rows=(
            Row("model.embed_tokens.weight", "embedding"),
            Row(f"{layer}.norm.weight", "layers.norm"),
            Row(f"{layer}.self_attn.q_proj.weight", "layers.attention.q", heads_out(HEADS, HEAD_DIM)),
            Row(f"{layer}.self_attn.q_proj.bias", "layers.attention.q_bias", heads_bias(HEADS, HEAD_DIM)),
            Row(
                f"{layer}.self_attn.{{part}}_proj.weight",
                "layers.attention.{part}",
                heads_out(KV_HEADS, HEAD_DIM),
                values={"part": ("k", "v")},
            ),
            Row(f"{layer}.self_attn.o_proj.weight", "layers.attention.o", heads_in(HEADS, HEAD_DIM)),
            Row(f"{layer}.mlp.{{j}}_proj.weight", "layers.gate_up", transpose, stacked={"j": ("gate", "up")}),
            Row(f"{layer}.mlp.down_proj.weight", "layers.down", transpose),
            *_block_rows("windowed", WINDOWED_BLOCKS),
            *_block_rows("full", FULL_BLOCKS),
            Row("lm_head.weight", "head", transpose),
        ),
        ignored=ignored,
        prefixes=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    )


def published_tensors(seed: int = 0, layers: int = LAYERS, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights with the published names and shapes."""
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, EMBED), "lm_head.weight": (VOCAB, EMBED)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.norm.weight": (EMBED,),
            f"model.layers.{i}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, EMBED),
            f"model.layers.{i}.self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, EMBED),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, EMBED),
            f"model.layers.{i}.self_attn.o_proj.weight": (EMBED, HEADS * HEAD_DIM),
            f"model.layers.{i}.mlp.gate_proj.weight": (MLP, EMBED),
            f"model.layers.{i}.mlp.up_proj.weight": (MLP, EMBED),
            f"model.layers.{i}.mlp.down_proj.weight": (EMBED, MLP),
        }
    for i in range(GROUPS * (WINDOWED + 1)):
        shapes |= {
            f"visual.blocks.{i}.attn.qkv.weight": (3 * HEADS * HEAD_DIM, EMBED),
            f"visual.blocks.{i}.norm.weight": (EMBED,),
        }
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
