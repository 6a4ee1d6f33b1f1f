"""The exceptions this project raises on purpose.

Every message answers: what is wrong, where, what was expected, what was found, and what to do about it.
This module imports nothing, so every room may use it.
"""

from __future__ import annotations


class Rdt2Error(Exception):
    """Base of all errors raised by the project.

    Args:
        what: one sentence that names the problem.
        where: file, key, tensor or index in which it was met.
        expected: what would have been accepted.
        found: what was there instead.
        fix: what the reader can do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix
        lines = [what]
        for label, value in (("where", where), ("expected", expected), ("found", found), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))


class ConfigError(Rdt2Error):
    """A configuration file or override that cannot be used."""


class DataError(Rdt2Error):
    """Input values of the wrong shape, type or range: actions, images, statistics, datasets."""


class CheckpointError(Rdt2Error):
    """Weights or checkpoints that are missing, damaged, or not the ones asked for."""


class UnsafeFileError(Rdt2Error):
    """A file that was refused because reading it could execute code or exhaust memory."""


class ShardingError(Rdt2Error):
    """A mesh, rule or shape that cannot be laid out over devices."""


class MissingExtraError(Rdt2Error):
    """An optional library is absent; the message names the extra that brings it."""


def missing_extra(library: str, extra: str, purpose: str) -> MissingExtraError:
    """Builds the error for an absent optional library.

    Args:
        library: import name that could not be found.
        extra: extra of the `rdt2-jax` distribution that installs it.
        purpose: what it is needed for, as a noun phrase.
    """
    return MissingExtraError(
        f"{purpose} needs the library '{library}', which is not installed",
        fix=f"pip install 'rdt2-jax[{extra}]'",
    )
