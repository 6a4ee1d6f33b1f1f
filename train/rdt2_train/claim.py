"""One run per folder."""

from __future__ import annotations

import json
from pathlib import Path

from rdt2_jax.config import FrozenConfig, dump_config
from rdt2_jax.errors import ConfigError
from rdt2_jax.io.files import atomic_write, make_folder

RUN_FILE = "training.json"


def claim(out: Path, config: FrozenConfig) -> None:
    """Writes the configuration of a run into its folder, or compares it with the one that is there.

    Raises:
        ConfigError: the folder holds a run of another configuration, or is a file.
    """
    if out.is_file():
        raise ConfigError("the folder of the run is a file", where=out, fix="give a folder with --out")
    make_folder(out)
    path = out / RUN_FILE
    if not path.exists():
        with atomic_write(path) as file:
            file.write(dump_config(config).encode())
        return
    ours = config.model_dump(mode="json")
    try:
        theirs = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(
            "the configuration of this run is damaged", where=path, found=str(error), fix="choose another folder"
        ) from error
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        raise ConfigError(
            "this folder holds a run of another configuration",
            where=path,
            found=f"different: {', '.join(different)}",
            fix="choose another folder, or give the configuration that the run was started with",
        )
