"""What is wrong with a sample or a shard: named reasons, counted, with the first of each kept for the report.

Nothing that is left out is left out silently. A reader meets a problem, hands it to a `Tally`, and goes on; a strict
tally stops at the first.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rdt2_jax.errors import DataError

REASONS = {
    "truncated-shard": "the archive ends before it is complete",
    "damaged-shard": "the archive cannot be read",
    "empty-shard": "the archive holds no sample",
    "duplicate-key": "two samples, or two members of one sample, have the same name",
    "missing-member": "a member that every sample needs is absent",
    "read-error": "the storage did not deliver the bytes",
    "corrupt-jpeg": "the image cannot be decoded",
    "wrong-image": "the image has another size",
    "corrupt-npy": "an array cannot be read",
    "wrong-dtype": "an array has another type",
    "wrong-shape": "an array has another shape",
    "not-finite": "an array holds NaN or infinity",
    "bad-rotation": "a rot6d is no rotation",
    "bad-token": "an action token is outside the vocabulary",
    "bad-meta": "meta.json cannot be read",
    "unknown-instruction": "there is no instruction, or its key is not in the instructions",
    "bad-conversation": "conversation.json cannot be read",
    "bad-time": "timestamps do not increase",
    "time-gap": "frames are missing: the time between two samples is too long",
    "camera-skew": "the two images were taken too far apart",
    "blank-image": "the image carries next to no information",
    "out-of-range": "a value is outside the range it should have",
    "mixed-kinds": "a folder holds actions and questions: read as one kind, all of the other are left out",
    "bad-recording": "a recording cannot be read",
}
"""Every reason for which a sample, a shard or a recording is left out or marked, with what it means."""

_EXAMPLES = 5


class SampleError(DataError):
    """A sample, shard or recording that cannot be used.

    Args:
        reason: a key of `REASONS`.
        where: file and sample.
        what: one sentence; the meaning of the reason by default.
        expected, found, fix: as in `Rdt2Error`.
    """

    def __init__(
        self,
        reason: str,
        *,
        where: object,
        what: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.reason = reason
        super().__init__(what or REASONS[reason], where=where, expected=expected, found=found, fix=fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.reason, self.where, self.what, self.expected, self.found, self.fix)

    def line(self) -> str:
        """The problem in one line: where, what, expected, found."""
        parts = [f"{self.where}: {self.what}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        return ", ".join(parts)


def _rebuild(reason: str, where: object, what: str, expected: object, found: object, fix: str | None) -> SampleError:
    return SampleError(reason, where=where, what=what, expected=expected, found=found, fix=fix)


class Tally:
    """Counts problems by reason and keeps the first few of each. Safe to use from several threads.

    Args:
        strict: raise the first problem instead of counting it.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, problem: SampleError) -> None:
        """Counts one problem.

        Raises:
            SampleError: the problem itself, when the tally is strict.
        """
        if self.strict:
            raise problem
        with self._lock:
            self._counts[problem.reason] += 1
            examples = self._examples.setdefault(problem.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(problem.line())

    def merge(self, report: Mapping[str, Any]) -> None:
        """Adds what another tally counted, as its `report` gives it; a strict tally does not stop at these."""
        with self._lock:
            for reason, entry in report["reasons"].items():
                self._counts[reason] += entry["count"]
                examples = self._examples.setdefault(reason, [])
                examples += entry["examples"][: _EXAMPLES - len(examples)]

    @property
    def total(self) -> int:
        """Problems counted so far."""
        with self._lock:
            return sum(self._counts.values())

    def counts(self) -> dict[str, int]:
        """Reason -> how often, the most frequent first."""
        return dict(self._snapshot()[0])

    def examples(self) -> dict[str, list[str]]:
        """Reason -> one line for each of the first few."""
        return self._snapshot()[1]

    def _snapshot(self) -> tuple[list[tuple[str, int]], dict[str, list[str]]]:
        """Counts, the most frequent first, and examples of one and the same moment."""
        with self._lock:
            return self._counts.most_common(), {reason: list(lines) for reason, lines in self._examples.items()}

    def report(self) -> dict[str, Any]:
        """For machines: total, and per reason its meaning, count and examples."""
        counts, examples = self._snapshot()
        by_reason = {
            reason: {"meaning": REASONS[reason], "count": count, "examples": examples[reason]}
            for reason, count in counts
        }
        return {"total": sum(entry["count"] for entry in by_reason.values()), "reasons": by_reason}

    def text(self) -> str:
        """For people: one paragraph per reason; empty where nothing was wrong."""
        counts, examples = self._snapshot()
        lines = []
        for reason, count in counts:
            lines.append(f"{count} x {reason}: {REASONS[reason]}")
            lines += [f"    {line}" for line in examples[reason]]
        return "\n".join(lines)
