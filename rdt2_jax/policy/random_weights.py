"""Whole policies with random weights: to try the code, to time it, to test what is around it, without a checkpoint.

Shapes are those of real policies ("7b": as published; "tiny": runs anywhere in seconds), and so is the work that is
done; what comes out means nothing. Even the tokenizer of words is made up here: `word_tokenizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers.pre_tokenizers

from rdt2_jax.action_expert import config as expert_config
from rdt2_jax.action_expert import model as expert_model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, MAX_POLICY_WIDTH, POSITION, ROT6D, WIDTH, arm_slice
from rdt2_jax.actions.normalizer import FieldNormalizer, FieldStatistics, LinearNormalizer
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import default_compute
from rdt2_jax.layers.stack import unstack
from rdt2_jax.params import ParamSpec, PyTree, fan_in_uniform, from_named_leaves, initialize, named_leaves, tree_bytes
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.fm import FmPolicy
from rdt2_jax.policy.one_step import OneStepPolicy
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.vq import VqPolicy
from rdt2_jax.qwen2_5_vl import config as backbone_config
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.int8 import quantize_decoder, quantized_decoder_specs
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, param_specs
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer
from rdt2_jax.qwen2_5_vl.vision import unstack_vision

PolicyKind = Literal["vq", "fm", "one-step"]
Size = Literal["tiny", "7b"]

SIZES: tuple[Size, ...] = ("tiny", "7b")

_EXPERT_PRESETS: dict[Size, str] = {"tiny": "tiny", "7b": "rdt2"}

_TOKENIZERS: dict[Size, ActionTokenizerConfig] = {
    "tiny": ActionTokenizerConfig(hidden_size=8, latent_size=16, embedding_dim=8),
    "7b": ActionTokenizerConfig(hidden_size=256, latent_size=256, embedding_dim=64),
}

POSITION_M, ROT6D_STEP, WIDTH_STEP = 0.02, 0.1, 0.015
"""What one normalised unit of a random policy is: metres, entries of rot6d, policy units of width."""

_DRAWN_ON_HOST_BYTES = 2**28

NUM_PIECES = 151643
"""Pieces of Qwen2.5's vocabulary; added tokens follow."""

_ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""Names of the published added tokens in the order of their ids, `NUM_PIECES` onwards."""

_WORDS = """
system user assistant You you are a an helpful the and or of in into inside on onto out from to with at by up down off
over under next near behind left right top bottom front back middle side first second this that it its one two three all
pick place put grasp grab take give hand lift lower move push pull press open close turn rotate pour shake wipe fold
unfold stack unstack insert remove slide drop release hold hang throw hit touch point reach bring clean sort tidy
apple banana orange lemon pear peach carrot tomato potato onion bread egg milk water juice coffee tea sugar salt
cup mug glass bottle can bowl plate dish tray pan pot lid spoon fork knife chopsticks kettle towel cloth napkin sponge
box bag basket drawer door cabinet shelf table desk chair sink block cube ball toy bear duck car book pen pencil marker
eraser paper tape scissors key keyboard button mouse phone cable plug charger remote hammer screwdriver shirt shoe hat
red green blue yellow white black brown pink purple grey small large big little round long short tall empty full
"""
"""One token each, as common words are in the published vocabulary: the chat template, and words of instructions."""


def random_policy(
    kind: PolicyKind,
    size: Size = "tiny",
    seed: int = 0,
    *,
    int8: bool = False,
    options: PolicyOptions | None = None,
) -> VqPolicy | FmPolicy | OneStepPolicy:
    """A policy whose every number is random, ready for `infer`.

    Args:
        kind: which policy.
        size: "7b" as published (the flow policies have the first 14 layers of the backbone alone), or "tiny".
        seed: of all weights.
        int8: the linear layers of the backbone's decoder in eight bits.
        options: how it is run.

    Raises:
        ConfigError: an unknown kind or size.
    """
    config, compute = random_backbone_config(kind, size), default_compute()
    backbone_key, part_key = jax.random.split(jax.random.key(seed))
    params = random_backbone_params(config, backbone_key, compute.dtype, with_head=kind == "vq", int8=int8)
    backbone = Backbone(config, params, Preprocessor(config, word_tokenizer(), PUBLISHED), compute)
    normalizer, options = random_normalizer(), options or PolicyOptions()
    if kind == "vq":
        return VqPolicy(backbone, random_action_tokenizer(size, part_key), normalizer, options=options)
    expert = random_expert(size, part_key, compute.dtype)
    policy = FmPolicy if kind == "fm" else OneStepPolicy
    return policy(backbone, expert, normalizer, options=options)


def random_policy_bytes(kind: PolicyKind, size: Size = "tiny", *, int8: bool = False) -> int:
    """Bytes of the weights of `random_policy`, counted before any is made."""
    dtype = default_compute().dtype
    backbone: Any = param_specs(random_backbone_config(kind, size), dtype, with_head=kind == "vq")
    if int8:
        backbone = quantized_decoder_specs(backbone)
    if kind == "vq":
        return tree_bytes((backbone, action_tokenizer.param_specs(_TOKENIZERS[size])))
    return tree_bytes((backbone, expert_model.param_specs(expert_config.preset(_EXPERT_PRESETS[size]), dtype)))


def require_memory(num_bytes: int) -> None:
    """Compares what weights take with what the default device has, or the host where that is the device.

    Raises:
        ConfigError: it does not fit.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        available = (device.memory_stats() or {}).get("bytes_limit")
    if available is not None and num_bytes > available:
        raise ConfigError(
            "the weights do not fit into memory",
            where=f"{device.device_kind} ({device.platform})",
            expected=f"at most {available / 1e9:.1f} GB",
            found=f"{num_bytes / 1e9:.1f} GB",
            fix="take a smaller model, eight bits (int8), or a larger machine",
        )


def random_backbone_config(kind: PolicyKind, size: Size) -> Qwen25VLConfig:
    """The backbone of a policy: for the flow policies only the layers that the expert reads.

    Raises:
        ConfigError: an unknown kind or size.
    """
    if kind not in ("vq", "fm", "one-step"):
        raise ConfigError("no such policy", where="kind", expected="vq, fm or one-step", found=kind)
    if size not in SIZES:
        raise ConfigError("no random policy of that size", where="size", expected=" or ".join(SIZES), found=size)
    config = backbone_config.preset(size)
    if kind == "vq":
        return config
    return config.with_layers(expert_config.preset(_EXPERT_PRESETS[size]).num_backbone_layers)


def random_backbone_params(
    config: Qwen25VLConfig, key: jax.Array, dtype: Any, *, with_head: bool = True, int8: bool = False
) -> Qwen25VLParams:
    """A backbone with a tree per layer; drawn (and rounded) layer by layer, so that little memory is needed beside it.

    Args:
        config: its shape.
        key: PRNG key.
        dtype: of the weights.
        with_head: with final norm and head.
        int8: the linear layers of the decoder in eight bits, as `int8.quantize_decoder` makes them.
    """
    specs = param_specs(config.with_layers(1), dtype, with_head=with_head)
    params = _drawn(dataclasses.replace(specs, text=dataclasses.replace(specs.text, layers=())), key, 0.2)
    one_layer = specs.text.layers

    def layer(index: int) -> Any:
        drawn = _drawn(one_layer, jax.random.fold_in(key, index), 0.2)
        (drawn,) = jax.device_put(unstack(drawn, delete=True))
        if not int8:
            return drawn
        text = dataclasses.replace(params.text, layers=(drawn,), norm=None, head=None)
        alone = Qwen25VLParams(vision=None, text=text)
        (rounded,) = quantize_decoder(alone, delete=True)[0].text.layers  # pyright: ignore[reportGeneralTypeIssues]
        return rounded

    layers = tuple(layer(i) for i in range(config.text.num_layers))
    vision = jax.device_put(unstack_vision(params.vision, delete=True))
    return Qwen25VLParams(vision=vision, text=dataclasses.replace(jax.device_put(params.text), layers=layers))


def random_expert(size: Size, key: jax.Array, dtype: Any) -> LoadedExpert:
    """An action expert, stacked. What starts at zero in training is drawn too, so that its answer depends on what it is
    given; a fresh one would answer with its noise."""
    config = expert_config.preset(_EXPERT_PRESETS[size])
    specs = expert_model.param_specs(config, dtype)
    width = config.hidden_size
    at_zero = {
        "layers.modulation.weight": 2 * width,
        "head.modulation.weight": 2 * width,
        "head.down.weight": 4 * width,
    }
    leaves = named_leaves(specs)
    for name, fan_in in at_zero.items():
        leaves[name] = dataclasses.replace(leaves[name], init=fan_in_uniform(fan_in))
    return LoadedExpert(config, jax.device_put(_drawn(from_named_leaves(specs, leaves), key, 0.1)))


def random_action_tokenizer(size: Size, key: jax.Array) -> LoadedTokenizer:
    """An action tokenizer with codes that were never trained."""
    config = _TOKENIZERS[size]
    return LoadedTokenizer(config, jax.device_put(_drawn(action_tokenizer.param_specs(config), key, 0.1)))


def _drawn(specs: PyTree, key: jax.Array, deviation: float) -> PyTree:
    """Values for a declaration: large ones on the device with their own initialisers, small ones on the host.

    Every shape's initialiser is a program to compile, and a small model has as many of them as a large one. Numpy draws
    its few numbers at once: norms are one, biases small, everything else of a given deviation, with which what goes in
    neither vanishes nor explodes on its way.
    """
    if tree_bytes(specs) > _DRAWN_ON_HOST_BYTES:
        return initialize(specs, key)
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def draw(name: str, spec: ParamSpec) -> np.ndarray:
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            return np.zeros(spec.shape, spec.dtype)
        if "norm" in name:
            return np.full(spec.shape, 0.0 if name.endswith("bias") else 1.0, spec.dtype)
        random = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        scale = 0.02 if name.endswith("bias") else deviation
        return (scale * random.standard_normal(spec.shape, np.float32)).astype(spec.dtype)

    return from_named_leaves(specs, {name: draw(name, spec) for name, spec in named_leaves(specs).items()})


def random_normalizer() -> LinearNormalizer:
    """Normalised numbers of size one become motions of a few centimetres and degrees around the arms' present poses.

    The mean of a channel is no motion, no rotation, a gripper half open. A scale of one would turn random numbers into
    metres and half turns, and rot6d of zeros, which a network without training may well say, into no rotation at all.
    """
    mean, step = np.zeros(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32)
    for arm in ARM_NAMES:
        center, unit = mean[arm_slice(arm)], step[arm_slice(arm)]
        center[ROT6D] = (1, 0, 0, 0, 1, 0)
        center[WIDTH] = MAX_POLICY_WIDTH / 2
        unit[POSITION], unit[ROT6D], unit[WIDTH] = POSITION_M, ROT6D_STEP, WIDTH_STEP
    statistics = FieldStatistics(min=mean - step, max=mean + step, mean=mean, std=step)
    return LinearNormalizer({"action": FieldNormalizer(1 / step, -mean / step, statistics)})


@functools.cache
def word_tokenizer() -> Tokenizer:
    """A stand-in for Qwen's tokenizer, of its size and with its control tokens, where no `tokenizer.json` can be had.

    It knows the 256 bytes, pairs of small letters, and some words; the rest of the vocabulary are fillers that no text
    turns into. The chat template takes as many tokens as with the published vocabulary, other words some more.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [(first, second) for first in letters for second in letters]
    words = [form for word in _WORDS.split() for form in (word, word.capitalize(), f"Ġ{word}", f"Ġ{word.capitalize()}")]
    pieces = dict.fromkeys([*sorted(_byte_alphabet()), *map("".join, pairs), *words])
    # a blank inside keeps fillers out of reach: the pieces of a text have no blanks, a space is written Ġ in them
    fillers = (f"filler {i}" for i in range(len(pieces), NUM_PIECES))
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *fillers])}
    split = {
        "type": "Split",
        "pattern": {"Regex": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    published = {
        "added_tokens": [_added_token(i, name) for i, name in enumerate(_ADDED_TOKENS, NUM_PIECES)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        # whole words first, then pairs of letters from the left
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": [list(pair) for pair in pairs]},
    }
    return Tokenizer(published, where="the stand-in for a tokenizer")


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level encoding."""
    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def _added_token(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True, **flags}
