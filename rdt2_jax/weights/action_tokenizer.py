"""The published `RVQActionTokenizer`: names of its `model.safetensors` and the leaves they fill."""

from __future__ import annotations

from rdt2_jax.actions.layout import GROUP_NAMES
from rdt2_jax.weights.ops import Op, conv1d, conv_transpose1d, transpose
from rdt2_jax.weights.table import Constant, Row, Table, Values

_NO_VALUES: Values = {}
_STAGES: Values = {"stage": (0, 1, 2)}
_HALVES: Values = {**_STAGES, "block": (1, 2), "half": (1, 2)}
_WHY_TRAINED = "a published codebook has seen data; the file does not say so"


def _convolution(source: str, leaf: str, op: Op = conv1d, values: Values = _NO_VALUES) -> tuple[Row, Row]:
    return (
        Row(f"{{group}}_vqvae.{source}.weight", f"networks.{{group}}.{leaf}.kernel", op, values=values),
        Row(f"{{group}}_vqvae.{source}.bias", f"networks.{{group}}.{leaf}.bias", values=values),
    )


def _norm(source: str, leaf: str, values: Values = _NO_VALUES) -> tuple[Row, Row]:
    return (
        Row(f"{{group}}_vqvae.{source}.weight", f"networks.{{group}}.{leaf}.scale", values=values),
        Row(f"{{group}}_vqvae.{source}.bias", f"networks.{{group}}.{leaf}.bias", values=values),
    )


def _stage(side: str, name: str, resample: str, op: Op, widening_block: int) -> tuple[Row, ...]:
    """Rows of the three stages of one side; the block that changes the width has a shortcut."""
    source, leaf = f"{side}.{name}_{{stage+1}}", f"{side}.stages.{{stage}}"
    return (
        *_norm(f"{source}.block_{{block}}.norm{{half}}", f"{leaf}.block_{{block}}.norm_{{half}}", _HALVES),
        *_convolution(
            f"{source}.block_{{block}}.conv{{half}}", f"{leaf}.block_{{block}}.conv_{{half}}", values=_HALVES
        ),
        *_convolution(f"{source}.{resample}", f"{leaf}.resample", op, _STAGES),
        *_convolution(
            f"{source}.block_{widening_block}.nin_shortcut", f"{leaf}.block_{widening_block}.shortcut", values=_STAGES
        ),
    )


def _projection(source: str, leaf: str) -> tuple[Row, Row]:
    prefix = f"{{group}}_vqvae.vq.quantizers.{{level}}.{source}"
    return (
        Row(f"{prefix}.weight", f"networks.{{group}}.projections.{leaf}_kernel", transpose),
        Row(f"{prefix}.bias", f"networks.{{group}}.projections.{leaf}_bias"),
    )


def _codebook(source: str | tuple[str, ...], leaf: str) -> Row:
    names = (source,) if isinstance(source, str) else source
    return Row(
        tuple(f"{{group}}_vqvae.vq.quantizers.{{level}}.{name}" for name in names), f"codebooks.{{group}}.{leaf}"
    )


ACTION_TOKENIZER = Table(
    name="RVQActionTokenizer",
    rows=(
        *_convolution("encoder.conv_in", "encoder.conv_in"),
        *_stage("encoder", "down", "downsample.conv", conv1d, widening_block=1),
        *_norm("encoder.norm_out", "encoder.norm_out"),
        *_convolution("encoder.conv_out", "encoder.conv_out"),
        *_projection("in_proj", "in"),
        *_projection("out_proj", "out"),
        # One tensor under two names; a file keeps either.
        _codebook(("codebook.weight", "weight"), "codes"),
        _codebook("ema_w", "ema_sum"),
        _codebook("ema_cluster_size", "ema_count"),
        _codebook("entry_hits", "hits"),
        *_norm("decoder.norm_in", "decoder.norm_in"),
        *_convolution("decoder.conv_in", "decoder.conv_in"),
        *_stage("decoder", "up", "upsample.conv_transpose", conv_transpose1d, widening_block=2),
        *_convolution("decoder.conv_out", "decoder.conv_out"),
    ),
    constants=(
        Constant("codebooks.{group}.cursor", 0, "the published file does not say how far the restart count is"),
        Constant("codebooks.{group}.initialized", True, _WHY_TRAINED),
    ),
    values={"group": GROUP_NAMES},
)
