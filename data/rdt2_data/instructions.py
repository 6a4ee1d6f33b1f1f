"""The sentences that samples point to: `instructions.json`, key -> sentence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rdt2_data.problems import SampleError
from rdt2_jax.errors import DataError


class Instructions(Mapping[str, str]):
    """Sentences by key. Keys are text, as JSON has no others: a sample's key 3 is looked up as "3".

    Args:
        sentences: key -> sentence.
        where: file, for messages.

    Raises:
        DataError: a sentence that is no text, or blank.
    """

    def __init__(self, sentences: Mapping[str, str], where: object = "instructions") -> None:
        self._where = where
        wrong = [key for key, text in sentences.items() if not isinstance(text, str) or not text.strip()]
        if wrong:
            raise DataError(
                "an instruction is no sentence",
                where=f"{where}, key {wrong[0]!r}",
                expected="a text that is not blank",
                found=f"{sentences[wrong[0]]!r} ({len(wrong)} such keys)",
            )
        self._sentences = {str(key): text for key, text in sentences.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Instructions:
        """Reads the file.

        Raises:
            DataError: missing, no JSON object, or a value that is no sentence.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError("there are no instructions", where=path, fix="check instruction_path") from error
        except (OSError, ValueError) as error:
            raise DataError("instructions cannot be read", where=path, expected="JSON", found=str(error)) from error
        if not isinstance(document, dict):
            expected = "an object: key -> sentence"
            raise DataError("no instructions", where=path, expected=expected, found=type(document).__name__)
        return cls(document, path)

    def __getitem__(self, key: str) -> str:
        return self._sentences[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sentences)

    def __len__(self) -> int:
        return len(self._sentences)

    def digest(self) -> str:
        """The same for the same sentences under the same keys."""
        return hashlib.sha256(json.dumps(sorted(self._sentences.items())).encode()).hexdigest()[:32]

    def updated(self, more: Mapping[str, str]) -> Instructions:
        """These sentences with others added or put in their place."""
        return Instructions({**self._sentences, **{str(key): text for key, text in more.items()}}, self._where)

    def text(self, key: str, where: object) -> str:
        """The sentence of a sample's key.

        Raises:
            SampleError: "unknown-instruction"; `where` names the sample.
        """
        if key not in self._sentences:
            expected = f"one of the {len(self)} keys of {self._where}"
            raise SampleError("unknown-instruction", where=where, expected=expected, found=repr(key))
        return self._sentences[key]
