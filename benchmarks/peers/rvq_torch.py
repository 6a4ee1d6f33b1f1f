"""A torch network with the action tokenizer's layers, as a peer to be timed against. Weights under published names."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

GROUP_CHANNELS = {
    "pos": [0, 1, 2, 10, 11, 12],
    "rot": [3, 4, 5, 6, 7, 8, 13, 14, 15, 16, 17, 18],
    "grip": [9, 19],
}


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels_in), nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.norm2, self.conv2 = norm(channels_out), nn.Conv1d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(x, (0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_transpose = nn.ConvTranspose1d(channels, channels, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_transpose(x)


class Stage(nn.Module):
    """`down_k` or `up_k` of the published names."""

    def __init__(self, channels_in: int, middle: int, channels_out: int, resample: str) -> None:
        super().__init__()
        self.block_1 = Block(channels_in, middle)
        setattr(self, resample, Downsample(middle) if resample == "downsample" else Upsample(middle))
        self.block_2 = Block(middle, channels_out)
        self.resample = resample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(getattr(self, self.resample)(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(channels, hidden, 3, padding=1)
        widths = [hidden, 2 * hidden, 4 * hidden, 8 * hidden]
        for i in range(3):
            setattr(self, f"down_{i + 1}", Stage(widths[i], widths[i + 1], widths[i + 1], "downsample"))
        self.norm_out, self.conv_out = norm(widths[3]), nn.Conv1d(widths[3], latent, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down_3(self.down_2(self.down_1(self.conv_in(x))))
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, channels: int, hidden: int, latent: int) -> None:
        super().__init__()
        widths = [8 * hidden, 4 * hidden, 2 * hidden, hidden]
        self.norm_in, self.conv_in = norm(latent), nn.Conv1d(latent, widths[0], 3, padding=1)
        for i in range(3):
            setattr(self, f"up_{i + 1}", Stage(widths[i], widths[i], widths[i + 1], "upsample"))
        self.conv_out = nn.Conv1d(hidden, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(functional.silu(self.norm_in(x)))
        return self.conv_out(self.up_3(self.up_2(self.up_1(x))))


class Quantizer(nn.Module):
    def __init__(self, latent: int, embedding: int, codes: int, restart_interval: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(latent, embedding), nn.Linear(embedding, latent)
        self.codebook = nn.Embedding(codes, embedding)
        self.register_buffer("ema_w", torch.zeros(codes, embedding))
        self.register_buffer("ema_cluster_size", torch.zeros(codes))
        self.register_buffer("entry_hits", torch.zeros(restart_interval, codes, dtype=torch.int32))

    def forward(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = functional.normalize(self.in_proj(residual), dim=-1)
        index = (embedding @ functional.normalize(self.codebook.weight, dim=-1).T).argmax(dim=-1)
        return index, self.out_proj(self.codebook(index))


class ResidualQuantizer(nn.Module):
    def __init__(self, levels: int, *arguments: int) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Quantizer(*arguments) for _ in range(levels))

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        residual, indices = latents, []
        for quantizer in self.quantizers:
            index, output = quantizer(residual)
            residual = residual - output
            indices.append(index)
        return torch.stack(indices, dim=-1)

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        return sum(q.out_proj(q.codebook(indices[..., i])) for i, q in enumerate(self.quantizers))


class VQVAE(nn.Module):
    def __init__(self, channels: int, levels: int, config) -> None:
        super().__init__()
        self.encoder = Encoder(channels, config.hidden_size, config.latent_size)
        self.vq = ResidualQuantizer(
            levels, config.latent_size, config.embedding_dim, config.num_codes, config.restart_interval
        )
        self.decoder = Decoder(channels, config.hidden_size, config.latent_size)


class ActionTokenizer(nn.Module):
    """`encode` (batch, frames, 20) -> tokens and `decode`, with the state dict of the published checkpoint."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        for group, channels in GROUP_CHANNELS.items():
            setattr(self, f"{group}_vqvae", VQVAE(len(channels), config.num_levels(group), config))

    def encode(self, actions: torch.Tensor) -> torch.Tensor:
        tokens = []
        for group, channels in GROUP_CHANNELS.items():
            vqvae = getattr(self, f"{group}_vqvae")
            latents = vqvae.encoder(actions[..., channels].transpose(1, 2)).transpose(1, 2)
            tokens.append(vqvae.vq.encode(latents).flatten(1))
        return torch.cat(tokens, dim=-1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        actions = torch.empty(len(tokens), self.config.chunk_length, 20)
        for group, channels in GROUP_CHANNELS.items():
            vqvae = getattr(self, f"{group}_vqvae")
            indices = tokens[:, self.config.token_slice(group)].reshape(len(tokens), -1, self.config.num_levels(group))
            latents = vqvae.vq.decode(indices).transpose(1, 2)
            actions[..., channels] = vqvae.decoder(latents).transpose(1, 2)
        return actions
