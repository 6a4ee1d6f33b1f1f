"""Tokenizer checkpoints in the published layout: `config.json` and `model.safetensors` in one folder.

Ours carry the normalizer beside them (`normalizer.npz`); the published checkpoint comes with a torch file elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig, read_published_config, write_published_config
from rdt2_jax.action_tokenizer.tokenizer import ActionTokenizerParams, param_specs
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.weights.action_tokenizer import ACTION_TOKENIZER
from rdt2_jax.weights.loader import Progress, export, load

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


def load_tokenizer(
    folder: str | Path, normalizer: str | Path | None = None, progress: Progress | None = None
) -> LoadedTokenizer:
    """Reads a checkpoint folder, published or ours.

    Args:
        folder: has config.json and model.safetensors.
        normalizer: file for `LinearNormalizer.load`; None takes `normalizer.npz` of the folder, if it is there.
        progress: called as (leaf, bytes done, bytes in all) while weights are read.

    Raises:
        CheckpointError, ConfigError: missing or damaged files, unknown keys, tensors that do not fit the configuration.
    """
    folder = Path(folder)
    config = read_published_config(folder / CONFIG_FILE)
    params, _ = load(ACTION_TOKENIZER, param_specs(config), folder / WEIGHTS_FILE, progress=progress)
    if normalizer is None and (folder / NORMALIZER_FILE).is_file():
        normalizer = folder / NORMALIZER_FILE
    return LoadedTokenizer(config, params, None if normalizer is None else LinearNormalizer.load(normalizer))


def save_tokenizer(tokenizer: LoadedTokenizer, folder: str | Path) -> None:
    """Writes a checkpoint into an existing folder, file by file whole, in the published layout.

    Settings that matter in training alone (EMA decay, rotation loss) are not part of the published configuration.
    """
    folder = Path(folder)
    export(ACTION_TOKENIZER, tokenizer.params, folder / WEIGHTS_FILE, overwrite=True)
    if tokenizer.normalizer is not None:
        tokenizer.normalizer.save(folder / NORMALIZER_FILE)
    write_published_config(tokenizer.config, folder / CONFIG_FILE)
