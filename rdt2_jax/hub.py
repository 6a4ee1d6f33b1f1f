"""Models by name: a local folder, or a repository of the Hugging Face hub.

A hub name is `organisation/name`, or `organisation/name@revision` with a branch, tag or commit. What is fetched goes
into the hub's cache (`HF_HOME`), and later calls need no network. Only files that are asked for are fetched, and
pickles only by their exact name: reading one may execute code.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from rdt2_jax.errors import CheckpointError, missing_extra

_HUB_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def model_folder(name: str | os.PathLike[str], *, needs: Sequence[str] = (), wants: Sequence[str] = ()) -> Path:
    """The local folder of a model.

    Args:
        name: an existing folder, or a hub name, `organisation/name[@revision]`. A folder goes before the hub.
        needs: file name patterns (`config.json`, `*.safetensors`); each must have at least one file.
        wants: patterns of files that are fetched too where the repository has them. Without any pattern all files
            are, but for pickles, which come only where a pattern ends like them.

    Returns:
        The folder: the one named, or the one in the hub's cache.

    Raises:
        CheckpointError: neither a folder nor a hub name, no such repository or revision, the hub cannot be reached
            and the cache does not have the files, or files are missing; says which, and where to put them.
        MissingExtraError: a hub name, and the library that talks to the hub is not installed.
    """
    text = os.fspath(name)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        _require_files(folder, needs, fix="copy them there from where the model was published")
        return folder
    found = _HUB_NAME.fullmatch(text)
    if found is None or folder.exists():
        raise CheckpointError(
            "not a model folder, and not a name on the hub",
            where=text,
            expected="an existing folder, or organisation/name[@revision]",
            found="a file" if folder.is_file() else "no such folder",
        )
    return _from_hub(found["repository"], found["revision"], needs, wants)


def _from_hub(repository: str, revision: str | None, needs: Sequence[str], wants: Sequence[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise missing_extra("huggingface_hub", "model", f"the hub name {repository}") from error
    # of whichever library the hub's client is built on
    http_error = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    where = repository if revision is None else f"{repository}@{revision}"
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*needs, *wants] or None,
            ignore_patterns=[p for p in _PICKLES if not any(fnmatch.fnmatchcase(n, p) for n in (*needs, *wants))],
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            "the repository is there for those who accepted its terms",
            where=f"https://huggingface.co/{repository}",
            fix="accept them there, then log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            "the repository has no such revision", where=repository, expected="a branch, tag or commit", found=revision
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            "no such repository on the hub, or it is private",
            where=where,
            found="no local folder of this name either",
            fix="check the spelling; for a private repository, log in with `hf auth login`",
        ) from error
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, http_error) as error:
        raise _unreachable(where, repository, needs, wants, error) from error
    _require_files(
        Path(folder), needs, fix=f"the repository does not have them, or not all of it is cached: fetch {where} again"
    )
    return Path(folder)


def _unreachable(
    where: str, repository: str, needs: Sequence[str], wants: Sequence[str], error: Exception
) -> CheckpointError:
    folder = repository.split("/")[1]
    also = f" (and what the repository has of {', '.join(wants)})" if wants else ""
    first_line = next(iter(str(error).strip().splitlines()), "no message")
    return CheckpointError(
        "the hub did not give the model, and the cache does not have it",
        where=where,
        expected=f"a connection, or a local folder with {', '.join(needs) or 'the files'}{also}",
        found=f"{type(error).__name__}: {first_line}",
        fix=f"run `hf download {where.replace('@', ' --revision ')} --local-dir {folder}` where there is a connection, "
        f"copy that folder here, and give its path, ./{folder}, instead of the name; or copy the hub's cache, and set "
        "HF_HOME to it and HF_HUB_OFFLINE=1",
    )


def _require_files(folder: Path, needs: Iterable[str], fix: str) -> None:
    missing = [pattern for pattern in needs if not any(path.is_file() for path in folder.glob(pattern))]
    if missing:
        present = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            "files of a model are missing",
            where=folder,
            expected=", ".join(missing),
            found=", ".join(present[:20]) + (f" and {len(present) - 20} more" if len(present) > 20 else "")
            or "an empty folder",
            fix=fix,
        )
