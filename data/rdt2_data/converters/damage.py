"""Errors of the libraries that read recordings, as problems that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rdt2_data.problems import SampleError


@contextmanager
def damage_named(what: str, where: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of some kinds into a SampleError "bad-recording".

    Args:
        what: one sentence.
        where: file, for the message.
        kinds: what a library raises for damage. What it stumbles over may be of any kind: only calls of the library
            belong inside.
    """
    try:
        yield
    except SampleError:
        raise
    except kinds as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise SampleError("bad-recording", what=what, where=where, found=found) from error
