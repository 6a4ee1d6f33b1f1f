"""Everything that is wrong with one input, collected so that it is reported at once."""

from __future__ import annotations

from rdt2_jax.errors import Rdt2Error

_SHOWN = 50
"""A message of hundreds of lines hides its beginning; the rest is counted."""


class Problems:
    """A growing list of one-line problems that becomes one error at the end of a check."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Records one problem: what, where, expected and found in one line."""
        self.lines.append(line)

    def raise_if_any(
        self,
        error: type[Rdt2Error],
        what: str,
        *,
        where: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        """Raises `error` with all problems under `found`, or returns if there are none.

        Args:
            error: exception class to raise.
            what: the sentence that names the failure as a whole; the number of problems is put before it.
            where, expected, fix: as in `Rdt2Error`.
        """
        if not self.lines:
            return
        count = len(self.lines)
        shown = [f"\n    {line}" for line in self.lines[:_SHOWN]]
        if count > _SHOWN:
            shown.append(f"\n    and {count - _SHOWN} more")
        noun = "problem" if count == 1 else "problems"
        raise error(f"{what} ({count} {noun})", where=where, expected=expected, found="".join(shown), fix=fix)
