"""The published RDT2-FM expert: names of its tensors and the leaves they fill.

Three tensors of every block are never used, neither in training nor in inference: the cross-attention reads keys and
values that the backbone made, so it needs no norm of the condition, no projection and no norm of keys.
"""

from __future__ import annotations

import numpy as np

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.weights.ops import Op, Permute, Split, chain, identity, merge
from rdt2_jax.weights.table import Ignored, Row, Table, Values

_NO_VALUES: Values = {}
_BLOCK = "model.blocks.{i}"
_UNUSED = ("cond_norm.weight", "cross_attn.wkv.weight", "cross_attn.norm_k.weight")


def action_expert_table(config: ActionExpertConfig) -> Table:
    """The published layout."""
    ignored = tuple(
        Ignored(f"{_BLOCK}.{name}", "the backbone's own keys and values are read", {"i": range(config.num_layers)})
        for name in _UNUSED
    )
    return Table("RDT2-FM action expert", (*_outer_rows(config), *_block_rows(config)), ignored)


def unused_tensors(config: ActionExpertConfig) -> dict[str, np.ndarray]:
    """What the published code wants to find in a file although it is never used, as a fresh model has it (projections,
    which would be random there, are zero)."""
    shapes = {
        "cond_norm.weight": np.ones(config.hidden_size, np.float32),
        "cross_attn.wkv.weight": np.zeros((2 * config.num_kv_heads * config.head_dim, config.hidden_size), np.float32),
        "cross_attn.norm_k.weight": np.ones(config.head_dim, np.float32),
    }
    return {f"model.blocks.{i}.{name}": value for i in range(config.num_layers) for name, value in shapes.items()}


def _outer_rows(config: ActionExpertConfig) -> tuple[Row, ...]:
    width = config.hidden_size
    return (
        *(
            row
            for kind, leaf in (("act", "action"), ("state", "state"))
            for place, part in enumerate((0, 2, 4))
            for row in _linear(f"{kind}_adaptor.{part}", f"{leaf}_adaptor.{place}")
        ),
        *_linear("model.t_embedder.mlp.0", "time.0"),
        *_linear("model.t_embedder.mlp.2", "time.1"),
        Row("model.register_tokens", "registers", merge(0, (1, config.num_registers))),
        Row("model.x_pos_emb", "positions", merge(0, (1, config.num_tokens))),
        Row("model.state_pos_emb", "state_position", merge(0, (1, 1, width))),
        *_linear("model.final_layer.adaLN_modulation.1", "head.modulation", Split(0, (2, width)), Split(0, (2, width))),
        Row("model.final_layer.ffn_norm.weight", "head.norm"),
        *_linear("model.final_layer.ffn.fc1", "head.up"),
        *_linear("model.final_layer.ffn.fc2", "head.down"),
    )


def _block_rows(config: ActionExpertConfig) -> tuple[Row, ...]:
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    modulation = Split(0, (3, 3, config.hidden_size))
    # keys and values alternate on the last axis of the published projection's output
    key_value = chain(Split(0, (kv_heads, head_dim, 2)), Permute((2, 0, 1, 3)))
    query, out = Split(0, (heads, head_dim)), Split(1, (heads, head_dim))
    own, cross = "layers.self_attention", "layers.cross_attention"
    return (
        *_linear(f"{_BLOCK}.adaLN_modulation.1", "layers.modulation", modulation, modulation),
        Row(f"{_BLOCK}.attn_norm.weight", "layers.self_norm"),
        Row(f"{_BLOCK}.attn.wq.weight", f"{own}.query.weight", query),
        Row(f"{_BLOCK}.attn.wkv.weight", f"{own}.key_value.weight", key_value),
        Row(f"{_BLOCK}.attn.norm_q.weight", f"{own}.query_norm"),
        Row(f"{_BLOCK}.attn.norm_k.weight", f"{own}.key_norm"),
        Row(f"{_BLOCK}.attn.wo.weight", f"{own}.out.weight", out),
        Row(f"{_BLOCK}.cross_norm.weight", "layers.cross_norm"),
        Row(f"{_BLOCK}.cross_attn.wq.weight", f"{cross}.query.weight", query),
        Row(f"{_BLOCK}.cross_attn.norm_q.weight", f"{cross}.query_norm"),
        Row(f"{_BLOCK}.cross_attn.wo.weight", f"{cross}.out.weight", out),
        Row(f"{_BLOCK}.ffn_norm.weight", "layers.mlp_norm"),
        *(
            Row(f"{_BLOCK}.ffn.{theirs}.weight", f"layers.mlp.{ours}.weight")
            for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
    )


def _linear(source: str, leaf: str, weight: Op = identity, bias: Op = identity) -> tuple[Row, Row]:
    return Row(f"{source}.weight", f"{leaf}.weight", weight), Row(f"{source}.bias", f"{leaf}.bias", bias)
