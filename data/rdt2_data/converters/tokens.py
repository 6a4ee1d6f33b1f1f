"""Action tokens of a conversion: computed in one process, so that a single one needs JAX and its device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdt2_data.converters.manifest import file_sha256
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.plan import ShardPart
from rdt2_data.converters.recording import RecordingReader
from rdt2_data.converters.shard import load_part
from rdt2_data.samples import TOKENS_PER_CHUNK
from rdt2_jax.errors import DataError
from rdt2_jax.io.arrays import write_array

BATCH = 256
"""Chunks encoded at once, always: the last batch of a shard is filled up, so that every shard gives the same tokens."""


class Tokenizing:
    """An action tokenizer, loaded when the first shard needs it.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        normalizer: file for `LinearNormalizer.load`; None takes `normalizer.npz` of the folder.
    """

    def __init__(self, checkpoint: Path, normalizer: Path | None = None) -> None:
        self.checkpoint, self.normalizer = checkpoint, normalizer
        self._loaded = None

    def fingerprint(self) -> str:
        """Checksum of the files.

        Raises:
            DataError: one of them is missing.
        """
        digest = hashlib.sha256()
        for path in self._files():
            if not path.is_file():
                raise DataError("a file of the action tokenizer is missing", where=path, expected="a checkpoint folder")
            digest.update(f"{path.name if self.normalizer != path else 'normalizer'} {file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def write(self, path: Path, reader: RecordingReader, parts: Sequence[ShardPart], options: ConvertOptions) -> None:
        """Computes the tokens of one shard and writes them as int16 (samples, 27)."""
        chunks = np.concatenate([load_part(reader, part, options)[2].actions for part in parts])
        write_array(path, self.encode(chunks))

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """Chunks float32 (N, 24, 20) in policy units -> int16 (N, 27)."""
        from rdt2_jax.action_tokenizer.tokenizer import encode

        loaded = self._load()
        tokens = np.empty((len(chunks), TOKENS_PER_CHUNK), np.int16)
        for start in range(0, len(chunks), BATCH):
            batch = chunks[start : start + BATCH]
            filled = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
            answer = np.asarray(encode(loaded.params, loaded.config, loaded.normalize(filled)))
            tokens[start : start + BATCH] = answer[: len(batch)]
        return tokens

    def _load(self):
        if self._loaded is None:
            from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer

            self._loaded = load_tokenizer(self.checkpoint, self.normalizer)
            config = self._loaded.config
            if config.num_tokens != TOKENS_PER_CHUNK or self._loaded.normalizer is None:
                expected = f"{TOKENS_PER_CHUNK} tokens a chunk, and a normalizer"
                found = f"{config.num_tokens} tokens, {'a' if self._loaded.normalizer else 'no'} normalizer"
                fix = "give the normalizer of the checkpoint (--tokenizer-normalizer)"
                what = "this action tokenizer cannot be used for shards"
                raise DataError(what, where=self.checkpoint, expected=expected, found=found, fix=fix)
        return self._loaded

    def _files(self) -> list[Path]:
        files = [self.checkpoint / "config.json", self.checkpoint / "model.safetensors"]
        if self.normalizer is not None:
            return [*files, self.normalizer]
        beside = self.checkpoint / "normalizer.npz"
        return [*files, beside] if beside.is_file() else files
