"""Tokenizer checkpoints in the published layout: `config.json` and `model.safetensors` in one folder.

Ours carry the normalizer beside them (`normalizer.npz`); the published checkpoint comes with a torch file elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig, read_published_config, write_published_config
from rdt2_jax.action_tokenizer.tokenizer import ActionTokenizerParams, param_specs
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.weights.action_tokenizer import tokenizer_table
from rdt2_jax.weights.loader import export, load

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
NORMALIZER_FILE = "normalizer.npz"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with what is needed to use it; without a normalizer it speaks normalised units."""

    config: ActionTokenizerConfig
    params: ActionTokenizerParams
    normalizer: LinearNormalizer | None = None

    def normalize(self, actions: Any) -> Any:
        """Policy units -> normalised, or unchanged without a normalizer."""
        return actions if self.normalizer is None else self.normalizer.normalize(actions)

    def unnormalize(self, actions: Any) -> Any:
        """Normalised -> policy units, or unchanged without a normalizer."""
        return actions if self.normalizer is None else self.normalizer.unnormalize(actions)
