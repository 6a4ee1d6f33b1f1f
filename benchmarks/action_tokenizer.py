"""Chunks per second of the action tokenizer beside a torch network of the same layers, weights and threads.

The floor is what the arithmetic alone would take at the matmul rate measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peers.rvq_torch import ActionTokenizer
from rdt2_data.synthetic import smooth_chunks
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from timing import paired_ratio, take_turns

from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, save_tokenizer
from rdt2_jax.action_tokenizer.config import DOWNSAMPLING, ActionTokenizerConfig
from rdt2_jax.action_tokenizer.tokenizer import decode, encode, param_specs
from rdt2_jax.actions.layout import GROUP_NAMES
from rdt2_jax.params import count_parameters, initialize

BAR_BATCH = 64
"""Batch size at which the bar of one times torch holds; single chunks are shown beside it."""

SIZES = {
    16: ActionTokenizerConfig(hidden_size=16, latent_size=32, embedding_dim=8),
    64: ActionTokenizerConfig(hidden_size=64, latent_size=64, embedding_dim=8),
    256: ActionTokenizerConfig(hidden_size=256, latent_size=256, embedding_dim=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    rate = measured_matmul_rate(arguments.seconds)
    rows = [
        row for hidden in arguments.hidden for row in compare(SIZES[hidden], arguments.batch, arguments.seconds, rate)
    ]
    if arguments.json:
        print(
            json.dumps(
                {"backend": jax.default_backend(), "threads": threads, "matmul_gflops": rate / 1e9, "rows": rows}
            )
        )
        return
    table = Table(
        title=f"{jax.default_backend()}, {threads} threads, float32, measured matmul rate {rate / 1e9:.0f} GFLOP/s"
    )
    for column in (
        "hidden",
        "parameters",
        "batch",
        "task",
        "ours chunks/s",
        "torch chunks/s",
        "ours/torch",
        "floor chunks/s",
        "ours/floor",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["hidden"]),
            f"{row['parameters'] / 1e6:.1f}M",
            str(row["batch"]),
            row["task"],
            f"{row['ours']:.0f}",
            f"{row['torch']:.0f}",
            f"{row['ratio']:.2f}x",
            f"{row['floor']:.0f}",
            f"{row['ours'] / row['floor']:.0%}",
        )
    Console(width=120).print(table)
    slower = [
        f"{row['task']} at hidden {row['hidden']}" for row in rows if row["batch"] == BAR_BATCH and row["ratio"] < 1.0
    ]
    if slower:
        raise SystemExit(f"below torch at batch {BAR_BATCH}: {', '.join(slower)}")


def compare(config: ActionTokenizerConfig, batches: list[int], seconds: float, matmul_rate: float) -> list[dict]:
    """Rows for one size; stops if the two networks do not agree."""
    specs = param_specs(config)
    params = jax.jit(lambda key: initialize(specs, key))(jax.random.key(0))
    peer = ActionTokenizer(config)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(LoadedTokenizer(config, params), Path(folder))
        weights = load_file(Path(folder) / "model.safetensors")
        peer.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    del weights
    peer.requires_grad_(False)
    rows = []
    for batch in batches:
        chunks = smooth_chunks(batch, seed=1)
        tokens = np.array(encode(params, config, chunks))
        must_agree(tokens, np.asarray(decode(params, config, tokens)), peer, chunks)
        tasks = contestants(params, config, peer, chunks, tokens)
        for task, (ours, theirs) in tasks.items():
            timings = take_turns({"ours": ours, "torch": theirs}, min_seconds=seconds, rounds=7)
            rows.append(
                {
                    "hidden": config.hidden_size,
                    "parameters": count_parameters(specs.networks),
                    "batch": batch,
                    "task": task,
                    "ours": batch / timings["ours"].median_s,
                    "torch": batch / timings["torch"].median_s,
                    "ratio": paired_ratio(timings["torch"], timings["ours"]),
                    "floor": matmul_rate / flops_per_chunk(config)[task],
                }
            )
    return rows


def contestants(params, config: ActionTokenizerConfig, peer: ActionTokenizer, chunks: np.ndarray, tokens: np.ndarray):
    """Task -> (ours, torch), each a function of no arguments."""
    ours_in, torch_in = jnp.asarray(chunks), torch.from_numpy(chunks)
    ours_tokens, torch_tokens = jnp.asarray(tokens), torch.from_numpy(tokens).long()
    return {
        "encode": (lambda: encode(params, config, ours_in).block_until_ready(), lambda: peer.encode(torch_in)),
        "decode": (lambda: decode(params, config, ours_tokens).block_until_ready(), lambda: peer.decode(torch_tokens)),
    }


def must_agree(tokens: np.ndarray, decoded: np.ndarray, peer: ActionTokenizer, chunks: np.ndarray) -> None:
    """A comparison of speed means something only between networks that compute the same."""
    theirs = peer.encode(torch.from_numpy(chunks)).numpy()
    agreement = float(np.mean(theirs == tokens))
    difference = float(np.abs(peer.decode(torch.from_numpy(tokens).long()).numpy() - decoded).max())
    if agreement < 0.99 or difference > 1e-4:
        raise SystemExit(
            f"the networks disagree: {agreement:.1%} equal tokens, decoded chunks differ by {difference:.1e}"
        )


def flops_per_chunk(config: ActionTokenizerConfig) -> dict[str, float]:
    """Multiply-adds counted as two, of convolutions and quantizer; norms and activations left out."""
    specs, flops = param_specs(config), {"encode": 0.0, "decode": 0.0}
    for group in GROUP_NAMES:
        network = specs.networks[group]
        flops["encode"] += encoder_flops(network.encoder, config) + quantizer_flops(config, group)
        flops["decode"] += decoder_flops(network.decoder, config)
    return flops


def encoder_flops(encoder, config: ActionTokenizerConfig) -> float:
    length = config.chunk_length
    total = kernel_flops(encoder.conv_in, length)
    for stage in encoder.stages:
        total += block_flops(stage.block_1, length)
        length //= 2
        total += kernel_flops(stage.resample, length) + block_flops(stage.block_2, length)
    return total + kernel_flops(encoder.conv_out, length)


def decoder_flops(decoder, config: ActionTokenizerConfig) -> float:
    length = config.chunk_length // DOWNSAMPLING
    total = kernel_flops(decoder.conv_in, length)
    for stage in decoder.stages:
        # Each tap of the transposed convolution meets every input once.
        total += block_flops(stage.block_1, length) + kernel_flops(stage.resample, length)
        length *= 2
        total += block_flops(stage.block_2, length)
    return total + kernel_flops(decoder.conv_out, length)


def block_flops(block, length: int) -> float:
    convolutions = [c for c in (block.conv_1, block.conv_2, block.shortcut) if c is not None]
    return sum(kernel_flops(convolution, length) for convolution in convolutions)


def kernel_flops(convolution, length: int) -> float:
    return 2.0 * convolution.kernel.size * length


def quantizer_flops(config: ActionTokenizerConfig, group) -> float:
    per_level = 2.0 * config.embedding_dim * (2 * config.latent_size + config.num_codes)
    return config.num_latents * config.num_levels(group) * per_level


def measured_matmul_rate(seconds: float, size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product, the better of jax and torch."""
    ours = jax.random.normal(jax.random.key(0), (size, size))
    theirs = torch.randn(size, size)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    timings = take_turns(
        {"ours": lambda: product(ours).block_until_ready(), "torch": lambda: theirs @ theirs},
        min_seconds=seconds,
        rounds=5,
    )
    return 2.0 * size**3 / min(min(timing.seconds) for timing in timings.values())


if __name__ == "__main__":
    main()
