"""Words to the ids of the language model's vocabulary, and back; read from the `tokenizer.json` of a model folder.

Control tokens are never found in a text: whatever it contains, `<|im_end|>` and `<tool_call>` included, becomes
ordinary pieces. Who wants a control token takes its id.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tokenizers

from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the control tokens; `quad_end` is written `<|quad_end|>` in the tokenizer's file, and so on.

    Attributes:
        endoftext: pads batches, and stands in for the action tokens of an invalid gripper.
        im_start, im_end: around a turn of the conversation.
        quad_start, quad_end: around the action tokens of a chunk.
        vision_start, vision_end: around the tokens of an image.
        image_pad: stands where an image's tokens go, once for each.
        video_pad: the same for videos, which are not supported.
    """

    endoftext: int
    im_start: int
    im_end: int
    quad_start: int
    quad_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int


class Tokenizer:
    """The byte-pair encoding of a model folder, and the ids of the tokens that were added to it.

    Attributes:
        control: ids of the control tokens.
        num_pieces: pieces that text can become: ids 0 .. num_pieces - 1 in the published files, where the action
            tokens count down from the last.
        vocabulary_size: one more than the highest id that has a meaning; a model may have rows beyond.
    """

    control: ControlTokens
    num_pieces: int
    vocabulary_size: int

    def __init__(self, published: Mapping[str, Any], where: str = TOKENIZER_FILE) -> None:
        """Takes the content of a `tokenizer.json`; `where` names it in errors.

        Raises:
            CheckpointError: not a byte-pair tokenizer, or one without the needed control tokens.
        """
        self._where = where
        added, model = published.get("added_tokens"), published.get("model")
        if not isinstance(added, list) or not isinstance(model, Mapping) or model.get("type") != "BPE":
            raise CheckpointError(
                "not the tokenizer of a Qwen2.5-VL",
                where=where,
                expected="a byte-pair encoding (model.type BPE) and added_tokens",
                fix="copy tokenizer.json from where the weights came from",
            )
        self._added = _added_ids(added, where)
        self._added_names = {token_id: name for name, token_id in self._added.items()}
        # An encoder without added tokens cannot find them in a text; without the rest it adds and cuts nothing.
        plain = {**published, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            self._pieces = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises nothing more specific
            raise _unreadable(where, str(error)) from error
        self.num_pieces = self._pieces.get_vocab_size()
        self.vocabulary_size = 1 + max(max(self._added_names, default=-1), max(model["vocab"].values(), default=-1))
        names = {field.name: f"<|{field.name}|>" for field in fields(ControlTokens)}
        problems = Problems()
        for name in names.values():
            if name not in self._added:
                problems.add(f"no {name}")
        problems.raise_if_any(
            CheckpointError,
            "the tokenizer lacks control tokens",
            where=where,
            fix="take tokenizer.json from a Qwen2.5-VL; that of a model for text alone may lack some",
        )
        self.control = ControlTokens(**{field: self._added[name] for field, name in names.items()})

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` of a model folder, or the file itself.

        Raises:
            CheckpointError: the file is missing or damaged, or lacks a needed control token.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            published = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                "a model needs its tokenizer.json", where=file, fix="copy it from where the weights came from"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise _unreadable(file, str(error)) from error
        if not isinstance(published, Mapping):
            raise _unreadable(file, f"a JSON {type(published).__name__}, not an object")
        return cls(published, where=str(file))

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, brought into Unicode's composed form (NFC) first; never the id of an added token.

        Raises:
            DataError: not a string, or one with half of a surrogate pair, which no encoding can write.
        """
        require_string(text, "a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "a text that is not valid Unicode", where=f"character {error.start}", found=ascii(text[error.start])
            ) from error
        return self._pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; added tokens appear by name, bytes that form no character as U+FFFD.

        Raises:
            DataError: an id without a meaning.
        """
        text: list[str] = []
        run: list[int] = []
        for token_id in map(as_token_id, ids):
            if token_id in self._added_names:
                text += [self._pieces.decode(run), self._added_names[token_id]]
                run = []
            elif self.is_piece(token_id):
                run.append(token_id)
            else:
                raise DataError(
                    "an id that the tokenizer does not know",
                    expected=f"0 to {self.vocabulary_size - 1}",
                    found=token_id,
                )
        return "".join([*text, self._pieces.decode(run)])

    def is_piece(self, token_id: int) -> bool:
        """Whether an id belongs to a piece of text, not to an added token nor to nothing at all."""
        known = 0 <= token_id < self.vocabulary_size and self._pieces.id_to_token(token_id) is not None
        return known and token_id not in self._added_names

    def token_id(self, name: str) -> int:
        """The id of an added token by the name it has in the file, such as `<|object_ref_start|>`.

        Raises:
            DataError: no added token has that name.
        """
        if name not in self._added:
            close = difflib.get_close_matches(str(name), self._added, n=3)
            raise DataError(
                "no such token was added to the tokenizer",
                where=self._where,
                expected=f"one of {', '.join(close or self._added)}",
                found=name,
            )
        return self._added[name]

    def check(self, config: Qwen25VLConfig) -> None:
        """Verifies that a model means the same by the ids as this tokenizer, and has a row for each.

        Raises:
            CheckpointError: names every id that differs.
        """
        problems = Problems()
        for field, name in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        ):
            expected, found = getattr(config, field), getattr(self.control, name)
            if expected != found:
                problems.add(f"{field} is {expected} in the configuration, <|{name}|> is {found} in the tokenizer")
        if self.vocabulary_size > config.text.vocab_size:
            problems.add(f"the tokenizer has {self.vocabulary_size} ids, the model rows for {config.text.vocab_size}")
        problems.raise_if_any(
            CheckpointError,
            "the tokenizer does not belong to the model",
            where=self._where,
            fix="take config.json and tokenizer.json from the same model",
        )


def _added_ids(added: list[Any], where: str) -> dict[str, int]:
    """Names of added tokens -> ids."""
    ids: dict[str, int] = {}
    for i, entry in enumerate(added):
        name, token_id = (entry.get("content"), entry.get("id")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or type(token_id) is not int or token_id < 0:
            raise _unreadable(where, f"added_tokens[{i}] is {entry!r}, without content and id")
        if name in ids or token_id in ids.values():
            raise _unreadable(where, f"added_tokens[{i}], {name} with id {token_id}, is there twice")
        ids[name] = token_id
    return ids


def _unreadable(where: object, found: str) -> CheckpointError:
    return CheckpointError(
        "not a readable tokenizer.json", where=where, found=found, fix="copy it again from where the weights came from"
    )


def require_string(text: Any, where: str) -> None:
    """Raises DataError unless the argument is a string; `where` names it."""
    if not isinstance(text, str):
        raise DataError("not a text", where=where, expected="a string", found=f"{type(text).__name__}: {text!r:.100}")


def as_token_id(value: Any) -> int:
    """The value as a plain integer (numpy and jax integers too); DataError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise DataError("not a token id", expected="an integer", found=f"{type(value).__name__}: {value!r}") from None
