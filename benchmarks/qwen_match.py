"""Qwen2.5-VL on both sides: the same random weights and prompt, for ours and for transformers, and whether they agree.

The model has the proportions of the 7B at a thirtieth of its size.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peers.qwen_transformers import Peer, image_processor, torch_arguments
from qwen_workload import (
    Prompt,
    decode_tokens,
    first_keys_values,
    full_prefill,
    make_prompt,
    start_decoding,
    vision_tokens,
)

from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, param_specs, unstacked
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, process
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

TOLERANCE = 1e-3
"""Largest difference of any output at which the two count as the same network."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        config: the model.
        image_size: of the composite image, height and width in pixels.
        num_words: tokens beside those of the image.
        steps: tokens to decode.
        seconds: length of one turn.
        rounds: turns of each contestant; half as many where there is no bar.
        judged: whether the bars apply.
    """

    config: Qwen25VLConfig
    image_size: tuple[int, int]
    num_words: int
    steps: int
    seconds: float
    rounds: int
    judged: bool


FULL = Setting(
    Qwen25VLConfig(
        # 7B: width 1280, 16 heads of 80, MLP of 2.7 times the width, 32 blocks in 4 groups
        vision=VisionConfig(
            depth=16,
            hidden_size=320,
            num_heads=4,
            intermediate_size=856,
            out_hidden_size=768,
            full_attention_blocks=(3, 7, 11, 15),
        ),
        # 7B: width 3584, 28 heads of 128 on 4 key heads, MLP of 5.3 times the width, 28 layers; the vocabulary takes as
        # large a share of a token's time as there
        text=TextConfig(
            vocab_size=22528, hidden_size=768, num_layers=28, num_heads=6, num_kv_heads=2, intermediate_size=3072
        ),
        image_token_id=22500,
        video_token_id=22501,
        vision_start_token_id=22498,
        vision_end_token_id=22499,
    ),
    image_size=(384, 768),
    num_words=42,
    steps=32,
    seconds=0.3,
    rounds=9,
    judged=True,
)

QUICK = Setting(
    Qwen25VLConfig(
        vision=VisionConfig(
            depth=2,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=64,
            full_attention_blocks=(1,),
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=96,
            mrope_sections=(2, 3, 3),
        ),
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=498,
        vision_end_token_id=499,
    ),
    image_size=(112, 168),
    num_words=10,
    steps=4,
    seconds=0.001,
    rounds=2,
    judged=False,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """Both sides with the same weights and the same prompt.

    Attributes:
        setting: what is run.
        stacked, unrolled: our parameters in both layouts.
        compute: how ours are computed.
        prompt: for ours.
        peer: the other model.
        arguments: the prompt for it.
    """

    setting: Setting
    stacked: Qwen25VLParams
    unrolled: Qwen25VLParams
    compute: Compute
    prompt: Prompt
    peer: Peer
    arguments: dict[str, torch.Tensor]

    @property
    def config(self) -> Qwen25VLConfig:
        return self.setting.config

    @property
    def half(self) -> int:
        """Layers that the action expert reads: half of them."""
        return self.config.text.num_layers // 2


def equal_threads(*, required: bool) -> dict[str, int]:
    """Sets torch's threads to the processors that this process may use, and counts those of XLA.

    Args:
        required: stop if the numbers differ.
    """
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((512, 512))))
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    pool = names.count("tf_XLAEigen")
    if required and pool != threads:
        raise SystemExit(f"not the same threads: torch has {threads}, XLA {pool}; choose processors with taskset")
    return {"torch": torch.get_num_threads(), "xla": pool}


def make_match(setting: Setting) -> Match:
    """Random weights, made by the peer and read by our loader."""
    peer = Peer(setting.config)
    with tempfile.TemporaryDirectory() as folder:
        peer.save(Path(folder))
        params, _ = load(qwen2_5_vl_table(setting.config), param_specs(setting.config), folder)
    prompt = make_prompt(setting.config, setting.image_size, setting.num_words)
    arguments = torch_arguments(setting.config, prompt.inputs)
    return Match(setting, params, unstacked(params), Compute(), prompt, peer, arguments)


def must_agree(match: Match) -> dict[str, float]:
    """Largest differences of all outputs that are timed; stops if one is too large."""
    params, config, compute, prompt = match.unrolled, match.config, match.compute, match.prompt
    theirs_half = match.peer.decoder(match.half)(**decoder_arguments(match), use_cache=True).past_key_values
    logits, cache = match.peer.prefill_decoder(match.arguments)
    seen_logits, seen_cache = match.peer.prefill(match.arguments)
    pixels = image_processor(PUBLISHED)(images=[prompt.image], return_tensors="np")["pixel_values"]
    decoder_only = prompt.without_image
    differences = {
        "patches": difference(process(prompt.image, PUBLISHED).values, pixels),
        "image tokens": difference(
            vision_tokens(params, config, prompt.inputs, compute)[0], match.peer.vision(match.arguments)
        ),
        "keys and values, first half": cache_difference(
            first_keys_values(params, config, decoder_only, compute, num_layers=match.half), theirs_half
        ),
        "keys and values": cache_difference(full_prefill(params, config, decoder_only, compute)[1], cache),
        "keys and values with image": cache_difference(
            full_prefill(params, config, prompt.inputs, compute)[1], seen_cache
        ),
        "logits": difference(full_prefill(params, config, decoder_only, compute)[0], logits),
        "logits, scanned": difference(full_prefill(match.stacked, config, decoder_only, compute)[0], logits),
        "logits with image": difference(full_prefill(params, config, prompt.inputs, compute)[0], seen_logits),
    }
    ours, theirs = decoders(match)["unrolled"](), decoders(match)["peer"]()
    differences["decoded tokens, share that differs"] = float(np.mean(np.asarray(ours) != theirs))
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise SystemExit(f"the networks disagree, nothing is timed: {worst} by {differences[worst]:.1e}")
    return differences


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


def cache_difference(ours: Any, theirs: Any) -> float:
    """Largest difference of keys and values over the layers that ours has."""
    pairs = list(zip(ours, theirs.layers, strict=True))
    return max(max(difference(a.key, b.keys), difference(a.value, b.values)) for a, b in pairs)


def decoder_arguments(match: Match) -> dict[str, torch.Tensor]:
    return {name: match.arguments[name] for name in ("input_ids", "position_ids")}


def decoders(match: Match) -> dict[str, Callable[[], Any]]:
    """Functions that decode `steps` tokens after the prompt, for both layouts and the peer."""
    config, prompt, steps = match.config, match.prompt, match.setting.steps
    functions: dict[str, Callable[[], Any]] = {}
    for name, params in (("unrolled", match.unrolled), ("scanned", match.stacked)):
        logits, keys_values = full_prefill(params, config, prompt.inputs, match.compute)
        token, cache = start_decoding(logits, keys_values, prompt.length, steps)

        def ours(params: Qwen25VLParams = params, token: jax.Array = token, cache: Any = cache) -> jax.Array:
            tokens = decode_tokens(params, config, prompt.inputs, match.compute, token, cache, steps=steps)
            return tokens.block_until_ready()

        functions[name] = ours
    logits_peer, cache_peer = match.peer.prefill(match.arguments)
    first, following = logits_peer.argmax(dim=-1), int(prompt.inputs.following[0])
    functions["peer"] = lambda: match.peer.decode(first, following, cache_peer, steps)
    return functions
