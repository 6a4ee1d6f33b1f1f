"""The policies with random weights, whole and taken apart into their stages on the device, with what each has to do."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from policies_workload import JPEG_QUALITY, PROMPT_LENGTH, inputs_of, jit_sample
from rates import Rates

from rdt2_jax.action_expert import cost as expert_cost
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_expert.flow import ONE_STEP, Schedule
from rdt2_jax.action_expert.model import Condition, unstacked
from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer
from rdt2_jax.action_tokenizer.tokenizer import decode
from rdt2_jax.action_tokenizer.vocabulary import tokens_to_ids
from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH
from rdt2_jax.actions.types import Observation
from rdt2_jax.layers.compute import default_compute
from rdt2_jax.params import tree_bytes
from rdt2_jax.policy.backbone import Backbone, embed, read_keys_values, read_prompt, without_images
from rdt2_jax.policy.base import BackbonePolicy
from rdt2_jax.policy.constrained import decode_actions
from rdt2_jax.policy.fm import FmPolicy
from rdt2_jax.policy.one_step import OneStepPolicy
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.random_weights import (
    PolicyKind,
    Size,
    random_action_tokenizer,
    random_backbone_config,
    random_backbone_params,
    random_expert,
    random_normalizer,
    word_tokenizer,
)
from rdt2_jax.policy.vq import VqPolicy
from rdt2_jax.qwen2_5_vl import cost
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED
from rdt2_jax.qwen2_5_vl.text import output_rows

Name = Literal["fm", "one-step", "vq", "vq int8"]


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations, and bytes read and written, of something that is done some times over."""

    flops: float
    num_bytes: float
    times: int = 1

    def floor_ms(self, rates: Rates) -> float:
        return self.times * max(rates.compute_ms(self.flops), rates.memory_ms(self.num_bytes))


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage on the device: does it and waits for it."""

    name: str
    function: Callable[[], Any]
    work: tuple[Work, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A policy taken apart.

    Attributes:
        name: policy.
        policy: the whole.
        startup_s: what making it took, compilation included, without drawing weights.
        inputs: its batch on the device.
        chunk: all stages in a row from there, without waiting between them, to the normalised chunk on the device.
        stages: the same one by one, each on what the one before gave.
        disagreement: largest relative difference between what is timed and what the policy itself does.
        decoding: text of the optimised program that decodes; None where nothing is decoded.
    """

    name: Name
    policy: BackbonePolicy
    startup_s: float
    inputs: ModelInputs
    chunk: Callable[[], jax.Array]
    stages: tuple[Stage, ...]
    disagreement: Callable[[], float]
    decoding: str | None = None


def relative_difference(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def random_backbone(kind: PolicyKind, size: Size, *, int8: bool = False) -> Backbone:
    """Of the flow policies the layers that the expert reads, of VQ all."""
    config, compute = random_backbone_config(kind, size), default_compute()
    params = random_backbone_params(config, jax.random.key(0), compute.dtype, with_head=kind == "vq", int8=int8)
    return Backbone(config, params, Preprocessor(config, word_tokenizer(), PUBLISHED), compute)


def subjects(size: Size, observation: Observation) -> Iterator[Subject]:
    """All policies; the backbone of one is gone when the next is asked for, so hold none of them."""
    backbone = random_backbone("fm", size)
    loaded = random_expert(size, jax.random.key(1), backbone.compute.dtype)
    expert = dataclasses.replace(loaded, params=unstacked(loaded.params, delete=True))
    for name in ("fm", "one-step"):
        yield flow_subject(name, backbone, expert, observation)
    del backbone, loaded, expert
    tokenizer = random_action_tokenizer(size, jax.random.key(1))
    for name in ("vq", "vq int8"):
        yield vq_subject(name, random_backbone("vq", size, int8=name == "vq int8"), tokenizer, observation)


def vision_stage(backbone: Backbone, inputs: ModelInputs) -> Stage:
    """Vision tower and embeddings."""
    config, params, compute = backbone.config, backbone.embedders, backbone.compute
    written = inputs.input_ids.size * config.text.hidden_size * jnp.dtype(compute.dtype).itemsize
    num_bytes = tree_bytes(params.vision) + inputs.patches.nbytes + written
    return Stage(
        "vision",
        lambda: embed(params, config, inputs, compute).block_until_ready(),
        (Work(cost.vision_flops(config.vision, inputs.grid), num_bytes),),
    )


def flow_subject(name: Name, backbone: Backbone, expert: LoadedExpert, observation: Observation) -> Subject:
    """The fm policy or the one-step policy."""
    config, compute, shape = backbone.config, backbone.compute, expert.config
    options = PolicyOptions(prompt_lengths=(PROMPT_LENGTH,))
    started = time.perf_counter()
    policy = (FmPolicy if name == "fm" else OneStepPolicy)(backbone, expert, random_normalizer(), options=options)
    startup_s = time.perf_counter() - started
    schedule = Schedule(shape.num_steps) if name == "fm" else ONE_STEP
    inputs, layers = inputs_of(backbone, observation, None), backbone.decoder(shape.num_backbone_layers)
    batch, length = without_images(inputs), int(inputs.valid.sum())
    noise, state = fixed_noise(), jnp.asarray(observation.state)[None]

    def vision() -> jax.Array:
        return embed(backbone.embedders, config, inputs, compute)

    def prefill(embeddings: jax.Array) -> Condition:
        found = read_keys_values(layers, config.text, embeddings, batch, compute, shape.condition_layers)
        return Condition(found, inputs.valid)

    def act(condition: Condition) -> jax.Array:
        return jit_sample(expert.params, shape, noise, condition, state, compute, schedule=schedule)

    def chunk() -> jax.Array:
        return act(prefill(vision()))

    def own_chunk() -> Any:
        (answer,) = policy.infer_batch([observation], noise=np.asarray(noise))
        return policy.normalizer.normalize(answer.actions)

    embeddings = vision()
    condition = prefill(embeddings)
    prefill_work = Work(
        cost.text_flops(config.text, length, shape.num_backbone_layers, keys_values_only=True),
        tree_bytes(layers.layers) + cost.cache_bytes(config.text, length, shape.num_backbone_layers, compute.dtype),
    )
    steps, params = schedule.num_velocities, expert.params
    expert_work = (
        Work(expert_cost.prepare_flops(shape, steps), expert_cost.prepare_bytes(params)),
        Work(
            expert_cost.velocity_flops(shape, length),
            expert_cost.velocity_bytes(params, shape, length, compute.dtype),
            steps,
        ),
    )
    return Subject(
        name,
        policy,
        startup_s,
        inputs,
        chunk,
        (
            vision_stage(backbone, inputs),
            Stage("prefill", lambda: jax.block_until_ready(prefill(embeddings)), (prefill_work,)),
            Stage("expert", lambda: act(condition).block_until_ready(), expert_work),
        ),
        lambda: relative_difference(chunk()[0], own_chunk()),
    )


def vq_subject(name: Name, backbone: Backbone, tokenizer: LoadedTokenizer, observation: Observation) -> Subject:
    """The vq policy, with the decoder as it is in `backbone`."""
    config, compute, words = backbone.config, backbone.compute, backbone.preprocessor.tokenizer
    options = PolicyOptions(prompt_lengths=(PROMPT_LENGTH,), jpeg_quality=JPEG_QUALITY)
    started = time.perf_counter()
    policy = VqPolicy(backbone, tokenizer, random_normalizer(), options=options)
    startup_s = time.perf_counter() - started
    inputs, decoder, text = inputs_of(backbone, observation, JPEG_QUALITY), backbone.decoder(), config.text
    batch, length, count = without_images(inputs), int(inputs.valid.sum()), tokenizer.config.num_tokens
    action_ids = jnp.asarray(tokens_to_ids(np.arange(tokenizer.config.num_codes), words.num_pieces), jnp.int32)
    stops = jnp.asarray([words.control.quad_end, words.control.im_end], jnp.int32)
    rows = output_rows(backbone.params.text, jnp.concatenate([action_ids, stops]))

    def vision() -> jax.Array:
        return embed(backbone.embedders, config, inputs, compute)

    prompt = read_prompt(decoder, text, vision(), batch, compute)
    embeddings = vision()
    # compiled by itself, to be looked at
    program = jit_decode_actions.lower(decoder, text, prompt, rows, action_ids, compute, count).compile()
    decoded = program(decoder, prompt, rows, action_ids)

    def chunk() -> jax.Array:
        found = read_prompt(decoder, text, vision(), batch, compute)
        return decode(tokenizer.params, tokenizer.config, program(decoder, found, rows, action_ids).codes)

    def disagreement() -> float:
        # the first token's probability: a later one depends on choices that near ties may turn over
        own = policy.tokens([observation])
        (answer,) = policy.chunks([observation], own)
        detokenised = decode(tokenizer.params, tokenizer.config, jnp.asarray(own.tokens))[0]
        return max(
            relative_difference(decoded.probabilities[:, 0], own.probabilities[:, 0]),
            relative_difference(detokenised, policy.normalizer.normalize(answer.actions)),
        )

    weights, row_bytes, middle = tree_bytes((decoder.layers, decoder.norm)), tree_bytes(rows), length + count // 2
    head_flops = 2.0 * len(action_ids) * text.hidden_size
    step_flops = cost.decode_flops(text, middle) - 2.0 * text.vocab_size * text.hidden_size + head_flops
    step_bytes = weights + row_bytes + cost.cache_bytes(text, middle, dtype=compute.dtype)
    prefill_work = Work(cost.text_flops(text, length), weights + cost.cache_bytes(text, length, dtype=compute.dtype))
    # a weight of the action tokenizer's decoders meets 24 frames at most: reading it is what takes time
    decoders = tree_bytes([network.decoder for network in tokenizer.params.networks.values()])
    return Subject(
        name,
        policy,
        startup_s,
        inputs,
        chunk,
        (
            vision_stage(backbone, inputs),
            Stage(
                "prefill",
                lambda: jax.block_until_ready(read_prompt(decoder, text, embeddings, batch, compute)),
                (prefill_work,),
            ),
            Stage(
                "decode",
                lambda: jax.block_until_ready(program(decoder, prompt, rows, action_ids)),
                (Work(head_flops, row_bytes), Work(step_flops, step_bytes, count - 1)),
            ),
            Stage(
                "detokenise",
                lambda: decode(tokenizer.params, tokenizer.config, decoded.codes).block_until_ready(),
                (Work(0.0, decoders),),
            ),
        ),
        disagreement,
        decoding=program.as_text(),
    )


jit_decode_actions = jax.jit(decode_actions, static_argnums=(1, 5, 6))


@functools.cache
def fixed_noise() -> jax.Array:
    """(1, 24, 20)."""
    return jax.random.normal(jax.random.key(2), (1, CHUNK_LENGTH, ACTION_DIM), jnp.float32)
