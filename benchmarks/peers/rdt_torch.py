"""A torch network with the action expert's layers, as a peer to be timed against. Weights under published names.

It computes as the published code does: modulations of all blocks in every step, keys and values of the condition
repeated for their query heads in every block, torch's fused attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.weights.action_expert import unused_tensors

FREQUENCIES = 256

KeysValues = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values (batch, kv_heads, length, head_dim) of each backbone layer that is read."""


def mlp(*sizes: int) -> nn.Sequential:
    """Linear maps with SiLU between them."""
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = mlp(FREQUENCIES, width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        angles = t[:, None] * torch.exp(-math.log(10_000.0) / half * torch.arange(half, dtype=torch.float32))
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class SelfAttention(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wkv = nn.Linear(width, 2 * config.num_kv_heads * head_dim, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, config.norm_eps), nn.RMSNorm(head_dim, config.norm_eps)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.norm_q(self.wq(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        # keys and values alternate on the last axis
        key, value = self.wkv(x).unflatten(-1, (self.kv_heads, self.head_dim, 2)).unbind(-1)
        key, value = self.norm_k(key).transpose(1, 2), value.transpose(1, 2)
        return self.wo(attend(query, key, value))


class CrossAttention(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        query = self.norm_q(self.wq(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        return self.wo(attend(query, key, value, valid[:, None, None, :]))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, length, width) of heads (batch, heads, length, head_dim)."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.w2 = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, 9 * width))
        self.attn_norm, self.attn = nn.RMSNorm(width, eps), SelfAttention(config)
        self.cross_norm, self.cross_attn = nn.RMSNorm(width, eps), CrossAttention(config)
        self.ffn_norm, self.ffn = nn.RMSNorm(width, eps), FeedForward(config)

    def forward(
        self, x: torch.Tensor, driver: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        parts = self.adaLN_modulation(driver).chunk(9, dim=-1)
        (shift_1, scale_1, gate_1), (shift_2, scale_2, gate_2), (shift_3, scale_3, gate_3) = (
            parts[i : i + 3] for i in (0, 3, 6)
        )
        x = x + gate_1[:, None] * self.attn(modulate(self.attn_norm(x), shift_1, scale_1))
        x = x + gate_2[:, None] * self.cross_attn(modulate(self.cross_norm(x), shift_2, scale_2), key, value, valid)
        return x + gate_3[:, None] * self.ffn(modulate(self.ffn_norm(x), shift_3, scale_3))


class OutputMLP(nn.Module):
    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.silu(self.fc1(x)))


class FinalLayer(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.ffn_norm = nn.RMSNorm(width, config.norm_eps)
        self.ffn = OutputMLP(width, 4 * width, config.action_dim)

    def forward(self, x: torch.Tensor, driver: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(driver).chunk(2, dim=-1)
        return self.ffn(modulate(self.ffn_norm(x), shift, scale))


class Network(nn.Module):
    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.t_embedder = TimeEmbedding(width)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.x_pos_emb = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.state_pos_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)


class ActionExpert(nn.Module):
    """`velocity` and `sample`, with the published state dict but for the tensors that are never used."""

    def __init__(self, config: ActionExpertConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.act_adaptor = mlp(config.action_dim, width, width, width)
        self.state_adaptor = mlp(config.state_dim, width, width, width)
        self.model = Network(config)

    @classmethod
    def from_file(cls, config: ActionExpertConfig, path: Path) -> ActionExpert:
        """Weights of a safetensors file with published names; everything in it must be used or known to be unused."""
        unused = unused_tensors(config)
        tensors = {name: tensor for name, tensor in load_file(path).items() if name not in unused}
        with torch.device("meta"):  # no time is spent on values that are replaced at once
            expert = cls(config)
        expert.load_state_dict(tensors, assign=True)
        return expert.requires_grad_(False).eval()

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, condition: KeysValues, valid: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """dx/dt.

        Args:
            x: (batch, frames, action_dim).
            t: (batch,).
            condition: of the layers that are read.
            valid: bool (batch, length), False for padding.
            state: (batch, state_dim).
        """
        network = self.model
        tokens = self.act_adaptor(x)
        tokens = torch.cat([tokens, network.register_tokens.expand(len(x), -1, -1)], dim=1) + network.x_pos_emb
        described = self.state_adaptor(state[:, None]) + network.state_pos_emb
        driver = torch.cat([network.t_embedder(t), described[:, 0]], dim=-1)
        for i, block in enumerate(network.blocks):
            tokens = block(tokens, driver, *condition[i % len(condition)], valid)
        return network.final_layer(tokens, driver)[:, : x.shape[1]]

    def sample(
        self, noise: torch.Tensor, condition: KeysValues, valid: torch.Tensor, state: torch.Tensor, num_steps: int
    ) -> torch.Tensor:
        """Normalised chunks by Euler's method; arguments as of `velocity`."""
        x = noise
        for i in range(num_steps):
            t = torch.full((len(x),), i / num_steps)
            x = x + self.velocity(x, t, condition, valid, state) / num_steps
        return x
