"""What an instruction should look like, and what to say about one that does not.

RDT2 was trained on instructions of one form, verb and object, a capital letter, a full stop: "Pick up the apple."
(RDT2 paper, arXiv 2602.03310, and the notes of its public code, which also ask for one task at a time). Another form
still runs. Nothing here changes what is run: it only advises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rdt2_jax.errors import DataError

_QUOTES = "\"'`“”„‟‘’‚‛«»‹›"
_LOOSE_ENDS = ".!,;:…。！、 "
_QUESTION_MARKS = "?？"

_POLITE_START = re.compile(
    r"(?:(?:please|kindly)|(?:can|could|will|would)\s+you(?:\s+please)?|i\s+(?:want|need|would\s+like)\s+you\s+to)"
    r"(?:\s*,\s*|\s+)",
    re.IGNORECASE,
)
_POLITE_END = re.compile(r"\s*,?\s+please$", re.IGNORECASE)

_VERBS = """
bring clean close collect cover cut drop empty fetch fill flip fold give grab grasp hand hang hit hold insert lay lift
move open pass pick place plug point pour press pull push put reach release remove return rotate screw set shake slide
sort squeeze stack stir sweep take throw tidy touch transfer turn twist unfold unplug unscrew unstack wipe write
"""
"""Verbs that begin a second task after "and"; "Pick up the red and blue cup." is one task."""

_PARTICLES = "away back down in off on out over up it them this that"
"""Words that do not make an object, as in "Pick it up."."""

_NOT_VERBS = "a an the this that these those my your his her its our their there here i you he she it we they is are"

_THEN = re.compile(r"(?:\s*[,;]\s*|\s+)(?:and\s+then|then|after\s+that|afterwards)\b\s*,?\s+", re.IGNORECASE)
_AND_VERB = re.compile(rf"(?:\s*,\s*|\s+)and\s+(?=(?:{'|'.join(_VERBS.split())})\b)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=\S)")
_PARTICIPLE = re.compile(r"\w*[aeiouy]\w*ing", re.IGNORECASE)


@dataclass(frozen=True)
class InstructionAdvice:
    """What there is to say about an instruction.

    Attributes:
        corrected: the instruction in the form of the training data; None where there is nothing to correct, or where
            it takes a person to say what is meant.
        reasons: one sentence for everything that deviates; empty for an instruction as it should be.
        tasks: where there are several, each as an instruction of its own.
    """

    corrected: str | None = None
    reasons: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether there is nothing to say."""
        return not self.reasons

    def lines(self) -> Iterator[str]:
        """The advice as lines of text: the reasons, then what to write instead."""
        yield from self.reasons
        if self.corrected is not None:
            yield f'write: "{self.corrected}"'
        elif self.tasks:
            yield "write one after the other: " + ", ".join(f'"{task}"' for task in self.tasks)


def suggested_instruction(text: str) -> str | None:
    """The corrected form of an instruction, or None: see `instruction_advice`."""
    return instruction_advice(text).corrected


def instruction_advice(text: str) -> InstructionAdvice:
    """Compares an instruction with the form of the training data.

    Corrected are blanks, quotes around it, courtesies ("Please ..."), capital letters and the end mark. Several
    tasks are separated. A question, a single word, an instruction that does not begin with a verb or is not written
    in Latin letters are only named. The corrected form needs no further advice.

    Args:
        text: the instruction.

    Raises:
        DataError: not a string.
    """
    if not isinstance(text, str):
        raise DataError("an instruction must be a text", expected="a string", found=f"{type(text).__name__}: {text!r}")
    reasons: list[str] = []
    body = _without_wrapping(text, reasons)
    body = _without_courtesy(body, reasons)
    if not any(character.isalpha() for character in body):
        return InstructionAdvice(reasons=("there are no words in it",))
    if body[-1] in _QUESTION_MARKS:
        return InstructionAdvice(reasons=(*reasons, "it is a question; say what to do instead"))
    body = _with_normal_case(body, reasons)
    tasks = [_finished(part) for part in _tasks(body)]
    if len(tasks) > 1:
        reasons.append(f"there are {len(tasks)} tasks in it; one instruction is one task")
        return InstructionAdvice(reasons=tuple(reasons), tasks=tuple(tasks))
    corrected = tasks[0]
    if body != corrected:
        reasons += _what_differs(body, corrected)
    doubts = _doubts(corrected)
    if doubts:
        return InstructionAdvice(reasons=(*reasons, *doubts))
    if corrected == text:
        return InstructionAdvice(reasons=tuple(reasons))
    # what was taken away may have hidden more, such as quotes behind a comma
    rest = instruction_advice(corrected)
    if not rest.fine:
        return InstructionAdvice(rest.corrected, tuple(dict.fromkeys((*reasons, *rest.reasons))), rest.tasks)
    return InstructionAdvice(corrected, tuple(reasons))


def _without_wrapping(text: str, reasons: list[str]) -> str:
    """Single blanks between words, none around, no quotes around the whole."""
    body = " ".join(text.split())
    if body != text:
        reasons.append("there are blanks around it, doubled blanks or line breaks")
    # a quote at one end alone may belong to a word, as in: the cups'
    bare = body.rstrip(_LOOSE_ENDS)
    if len(bare) > 1 and bare[0] in _QUOTES and bare[-1] in _QUOTES:
        reasons.append("there are quotes around it")
        while len(bare) > 1 and bare[0] in _QUOTES and bare[-1] in _QUOTES:
            tail = body[len(bare) :] if len(bare) < len(body) else ""
            body = (bare[1:-1] + tail).strip()
            bare = body.rstrip(_LOOSE_ENDS)
    return body


def _without_courtesy(body: str, reasons: list[str]) -> str:
    """Without "please" and "could you"; what was a polite question ends like an instruction."""
    start = _POLITE_START.match(body)
    rest = body[start.end() :] if start else body
    bare = rest.rstrip(_LOOSE_ENDS + _QUESTION_MARKS)
    end = _POLITE_END.search(bare)
    if start is None and end is None:
        return body
    reasons.append("courtesies were not in the training data")
    shortened = bare[: end.start()] if end else bare
    was_asked = start is not None and "you" in start.group().lower().split()
    mark = rest[len(bare) :].strip()
    question = bool(mark) and mark[-1] in _QUESTION_MARKS and not was_asked
    return _without_courtesy(shortened[:1].upper() + shortened[1:] + ("?" if question else "."), [])


def _with_normal_case(body: str, reasons: list[str]) -> str:
    """Small letters where everything was in capitals."""
    if len(body.split()) > 1 and body.isupper():
        reasons.append("it is all in capital letters")
        lowered = body.lower()
        return lowered[:1].upper() + lowered[1:]
    return body


def _tasks(body: str) -> list[str]:
    """The body cut where another sentence or another task begins."""
    sentences = [part for part in _SENTENCE_END.split(body) if any(map(str.isalpha, part))]
    parts = [part for sentence in sentences for piece in _THEN.split(sentence) for part in _AND_VERB.split(piece)]
    return [part for part in parts if any(map(str.isalpha, part))] or [body]


def _finished(part: str) -> str:
    """One task with a capital letter and one full stop."""
    words = re.sub(r"^(?:and\s+then|and|then)\s+(?=\S)", "", part.strip(_LOOSE_ENDS), flags=re.IGNORECASE)
    return f"{words[:1].upper()}{words[1:]}."


def _what_differs(body: str, corrected: str) -> Iterator[str]:
    words = body.strip(_LOOSE_ENDS)
    if words[:1].upper() != words[:1]:
        yield "it does not begin with a capital letter"
    if not body.endswith("."):
        yield "it does not end with a full stop"
    elif body[:-1].strip(_LOOSE_ENDS) != body[:-1] or body[:1] in _LOOSE_ENDS:
        yield "there are stray marks around it"
    elif corrected[1:] != body[1:]:
        yield "it begins like the second of two tasks"


def _doubts(instruction: str) -> tuple[str, ...]:
    """What only a person can put right."""
    words = re.findall(r"[^\W\d_][\w'’-]*|\d+", instruction)
    doubts: list[str] = []
    first = words[0].lower() if words else ""
    if any(letter.isalpha() and not _is_latin(letter) for letter in instruction):
        doubts.append("it is not written in Latin letters; the training data were in English")
    elif len(words) == 1:
        doubts.append("it is a single word; name the object too, as in “Pick up the apple.”")
    elif first in _NOT_VERBS.split():
        doubts.append(f"it begins with “{words[0]}”, not with a verb, as in “Pick up the apple.”")
    elif _PARTICIPLE.fullmatch(first):
        doubts.append(f"it begins with “{words[0]}”; the training data say what to do, as in “Pick up the apple.”")
    elif all(word.lower() in _PARTICLES.split() for word in words[1:]):
        doubts.append("it names no object, as in “Pick up the apple.”")
    return tuple(doubts)


def _is_latin(letter: str) -> bool:
    """Whether a letter belongs to the Latin blocks of Unicode (Basic Latin up to Latin Extended-B, and Additional)."""
    return ord(letter) < 0x250 or 0x1E00 <= ord(letter) < 0x1F00
