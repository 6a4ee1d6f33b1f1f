"""What takes turns: our policies and networks, and those of torch and transformers, and whether they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peers.qwen_transformers import image_processor
from peers.rdt_torch import KeysValues
from policies_match import ExpertMatch, PolicyMatch
from policies_workload import JPEG_QUALITY, jit_sample
from qwen_match import difference

from rdt2_jax.action_expert.flow import Schedule
from rdt2_jax.action_expert.model import Condition, velocity
from rdt2_jax.action_tokenizer.vocabulary import ids_to_tokens
from rdt2_jax.policy.backbone import embed, read_keys_values, without_images
from rdt2_jax.policy.fm import FmPolicy
from rdt2_jax.policy.one_step import OneStepPolicy
from rdt2_jax.policy.prompts import through_jpeg
from rdt2_jax.policy.random_weights import random_normalizer
from rdt2_jax.policy.vq import VqPolicy
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, composite
from rdt2_jax.qwen2_5_vl.prompt import action_prompt

TOLERANCE = 1e-3
"""Largest difference of velocities and normalised chunks, which are of size one, at which two networks are the same."""


@dataclasses.dataclass(frozen=True, eq=False)
class PeerPolicies:
    """Whole policies of torch and transformers: from uint8 images to chunks in physical units, as published.

    All layers of the backbone run, with final norm and head; of the logits only the last position's are computed.
    """

    both: PolicyMatch

    def arguments(self, jpeg_quality: int | None) -> dict[str, torch.Tensor]:
        """What transformers' model takes."""
        observation, preprocessor = self.both.observation, self.both.backbone.preprocessor
        image = composite(observation.images["left_wrist"], observation.images["right_wrist"])
        if jpeg_quality is not None:
            image = through_jpeg(image, jpeg_quality)
        pixels = image_processor(PUBLISHED)(images=[image], return_tensors="pt")
        tokens = int(pixels["image_grid_thw"].prod()) // self.both.match.config.vision.merge_unit
        ids = torch.tensor([action_prompt(preprocessor.tokenizer, observation.instruction, tokens)])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.both.match.config.image_token_id).long(),
            **pixels,
        }

    def flow(self, expert: ExpertMatch, num_steps: int) -> np.ndarray:
        """A chunk (24, 20) of the fm policy, or of the one-step policy."""
        done = self.both.match.peer.model(**self.arguments(None), use_cache=True, logits_to_keep=1)
        layers = done.past_key_values.layers
        condition = [(layers[i].keys, layers[i].values) for i in expert.config.condition_layers]
        valid = torch.ones(1, condition[0][0].shape[2], dtype=torch.bool)
        noise, state = torch.from_numpy(self.both.noise), torch.tensor(self.both.observation.state)[None]
        return self.denormalised(expert.peer.sample(noise, condition, valid, state, num_steps))

    def vq(self) -> np.ndarray:
        """A chunk (24, 20) of whatever 29 tokens are generated; ids that are no action tokens are clamped."""
        codes = self.codes(self.generated(self.both.tokenizer.config.num_tokens + 2))
        return self.denormalised(self.both.peer_tokenizer.decode(torch.from_numpy(codes[None])))

    def generated(self, steps: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """Greedy ids (steps,); `allowed` are those that may be chosen."""
        given = self.arguments(JPEG_QUALITY)
        length = given["input_ids"].shape[1]
        options: dict[str, Any] = {}
        if allowed is not None:
            options["prefix_allowed_tokens_fn"] = lambda batch, ids: allowed.tolist()
        whole = self.both.match.peer.model.generate(
            **given, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        return np.asarray(whole[0, length:])

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Ids to action tokens, int64."""
        config, words = self.both.tokenizer.config, self.both.backbone.preprocessor.tokenizer
        tokens, _ = ids_to_tokens(ids[: config.num_tokens], config.num_codes, words.num_pieces)
        return np.asarray(tokens, np.int64)

    def denormalised(self, normalized: torch.Tensor) -> np.ndarray:
        field = random_normalizer().field("action")
        return ((normalized - torch.tensor(field.offset)) / torch.tensor(field.scale))[0].numpy()


def policies(both: PolicyMatch, expert: ExpertMatch) -> tuple[FmPolicy, OneStepPolicy]:
    """Ours, compiled."""
    normalizer = random_normalizer()
    return (
        FmPolicy(both.backbone, expert.loaded, normalizer, options=both.options),
        OneStepPolicy(both.backbone, expert.loaded, normalizer, options=both.options),
    )


def vq_policy(both: PolicyMatch) -> VqPolicy:
    """Ours, compiled."""
    return VqPolicy(both.backbone, both.tokenizer, random_normalizer(), options=both.options)


def our_prefill(both: PolicyMatch) -> Any:
    """Keys and values of the layers that the experts read, from embeddings: the decoder's part alone."""
    return prefill_function(both)()


def prefill_function(both: PolicyMatch) -> Callable[[], Any]:
    """The stage "prefill" of the flow policies on a prompt of the bucket's length."""
    config, compute, half = both.match.config, both.match.compute, both.match.half
    embeddings = embed(both.backbone.embedders, config, both.inputs, compute)
    decoder, batch = both.backbone.decoder(half), without_images(both.inputs)
    arguments = (decoder, config.text, embeddings, batch, compute, tuple(range(half)))
    return lambda: jax.block_until_ready(read_keys_values(*arguments))


jit_velocity = jax.jit(velocity, static_argnums=(1, 6))


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertTasks:
    """One expert's networks as functions of no arguments, on both sides, over the same condition."""

    ours: dict[str, Callable[[], jax.Array]]
    peer: dict[str, Callable[[], torch.Tensor]]


def expert_tasks(both: PolicyMatch, expert: ExpertMatch) -> ExpertTasks:
    """One velocity, a sample of all steps, a sample of one."""
    keys_values = our_prefill(both)[: expert.config.num_backbone_layers]
    state, t = jnp.asarray(both.observation.state[None]), jnp.full((1,), 0.4)
    condition = Condition(keys_values, both.inputs.valid)
    theirs: KeysValues = [tuple(torch.tensor(np.asarray(x)) for x in (kv.key, kv.value)) for kv in keys_values]
    rest = theirs, torch.tensor(np.asarray(both.inputs.valid)), torch.tensor(np.asarray(state))
    noise, compute = jnp.asarray(both.noise), both.match.compute
    torch_noise, torch_t = torch.from_numpy(both.noise), torch.full((1,), 0.4)
    config, params, peer, steps = expert.config, expert.loaded.params, expert.peer, expert.config.num_steps

    def ours(num_steps: int) -> Callable[[], jax.Array]:
        schedule = Schedule(num_steps)
        return lambda: jit_sample(
            params, config, noise, condition, state, compute, schedule=schedule
        ).block_until_ready()

    return ExpertTasks(
        {
            "one velocity": lambda: jit_velocity(
                params, config, noise, t, condition, state, compute
            ).block_until_ready(),
            f"sample of {steps} steps": ours(steps),
            "sample of 1 step": ours(1),
        },
        {
            "one velocity": lambda: peer.velocity(torch_noise, torch_t, *rest),
            f"sample of {steps} steps": lambda: peer.sample(torch_noise, *rest, steps),
            "sample of 1 step": lambda: peer.sample(torch_noise, *rest, 1),
        },
    )


def must_agree(both: PolicyMatch) -> dict[str, float]:
    """Largest differences of all that is timed; stops if one is too large."""
    normalizer, peers, differences = random_normalizer(), PeerPolicies(both), {}
    for name, expert in both.experts.items():
        tasks = expert_tasks(both, expert)
        for task, ours in tasks.ours.items():
            differences[f"expert, {name}: {task}"] = difference(ours(), tasks.peer[task]())
        for policy, steps in zip(policies(both, expert), (expert.config.num_steps, 1), strict=True):
            (chunk,) = policy.infer_batch([both.observation], noise=both.noise)
            chunks = (chunk.actions, peers.flow(expert, steps))
            differences[f"chunk, {policy.kind}, {name}"] = difference(*map(normalizer.normalize, chunks))
    policy = vq_policy(both)
    words, config = both.backbone.preprocessor.tokenizer, both.tokenizer.config
    allowed = words.num_pieces - 1 - np.arange(config.num_codes)
    theirs = peers.codes(peers.generated(config.num_tokens, allowed))
    differences["action tokens, share that differs"] = float(
        np.mean(policy.tokens([both.observation]).tokens[0] != theirs)
    )
    decoded = peers.denormalised(both.peer_tokenizer.decode(torch.from_numpy(theirs[None])))
    chunk = policy.infer(both.observation).actions
    differences["chunk, vq"] = difference(*map(normalizer.normalize, (chunk, decoded)))
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise SystemExit(f"the networks disagree, nothing is timed: {worst} by {differences[worst]:.1e}")
    return differences
