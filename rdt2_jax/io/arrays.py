"""Arrays in `.npy` files: read without unpickling, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write


def read_array(path: str | Path) -> np.ndarray:
    """Memory-maps a `.npy` file; object arrays are refused, since they could only be read by unpickling.

    Raises:
        DataError: the file is missing, damaged, not a `.npy` file, or holds Python objects.
    """
    path = Path(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError("no such file", where=path, expected="an array saved by numpy.save") from error
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            "not a readable .npy file", where=path, expected="an array saved by numpy.save", found=str(error)
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError("holds several arrays", where=path, expected="one array saved by numpy.save", found=type(array))
    return array


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a `.npy` file under a temporary name and renames it.

    Raises:
        DataError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise DataError("cannot write there", where=path, expected="an existing folder", found=f"no {path.parent}")
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)
