"""What a model folder holds: which kind of weights, how much of a model, and the small files beside them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from rdt2_jax.checkpoints import is_checkpoint, stored_items
from rdt2_jax.errors import CheckpointError
from rdt2_jax.hub import model_folder
from rdt2_jax.qwen2_5_vl.config import CONFIG_FILE, Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, param_specs
from rdt2_jax.qwen2_5_vl.processor import PROCESSOR_FILE
from rdt2_jax.qwen2_5_vl.tokenizer import TOKENIZER_FILE
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table
from rdt2_jax.weights.safetensors_files import INDEX_FILE, SINGLE_FILE
from rdt2_jax.weights.table import Table

PARAMS_ITEM = "params"
"""The item of a checkpoint that holds a model's parameters."""

SMALL_FILES = ("*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Configuration, tokenizer, processor, terms: copied from one kind of folder to the other."""

LAYERS = "text.layers."
"""How the names of leaves begin that are stacked over decoder layers."""

_WEIGHTS = ("*.safetensors", f"{PARAMS_ITEM}/*", "metadata/*")

PUBLISHED_FILES = (
    *(CONFIG_FILE, "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
    *(TOKENIZER_FILE, "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    *(PROCESSOR_FILE, "processor_config.json", "video_preprocessor_config.json"),
)
"""Names of the small files that publishers of such models use."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much of a model there is: its first `num_layers` decoder layers, final norm and head, the vision tower."""

    num_layers: int
    with_head: bool
    vision: bool

    def specs(self, config: Qwen25VLConfig) -> Qwen25VLParams:
        """The declaration of these parameters; `config` is that of the whole model."""
        return param_specs(config.with_layers(self.num_layers), vision=self.vision, with_head=self.with_head)

    def table(self, config: Qwen25VLConfig) -> Table:
        """The published layout of the whole model, in which the rest is ignored."""
        return qwen2_5_vl_table(
            config.with_layers(self.num_layers),
            published_layers=config.text.num_layers,
            vision=self.vision,
            with_head=self.with_head,
        )

    def __str__(self) -> str:
        head = "norm and head" if self.with_head else "no norm, no head"
        return f"{self.num_layers} layers, {head}, {'a' if self.vision else 'no'} vision tower"


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder of a model, by path or hub name.

    Raises:
        CheckpointError: as `model_folder`.
    """
    return model_folder(name, needs=(CONFIG_FILE,), wants=(*_WEIGHTS, *SMALL_FILES))


def find_preprocessor(name: str | os.PathLike[str]) -> Path:
    """The folder with configuration, tokenizer and processor of a model, by path or hub name; no weights are fetched.

    Raises:
        CheckpointError: as `model_folder`; one of the three files is missing.
    """
    return model_folder(name, needs=(CONFIG_FILE, TOKENIZER_FILE, PROCESSOR_FILE))


def is_converted(folder: Path) -> bool:
    """True for our Orbax item, False for published safetensors.

    Raises:
        CheckpointError: neither is there, or both are.
    """
    published = [name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    converted = is_checkpoint(folder) and PARAMS_ITEM in stored_items(folder)
    if converted and published:
        raise CheckpointError(
            "two sets of weights in one folder", where=folder, found=f"{', '.join(published)} and Orbax items"
        )
    if not converted and not published:
        raise CheckpointError(
            "no weights in the folder",
            where=folder,
            expected=f"{SINGLE_FILE}, {INDEX_FILE} with its shards, or what `rdt2 convert weights` wrote",
            found=", ".join(sorted(file.name for file in folder.iterdir())[:20]),
        )
    return converted


def stored_extent(folder: Path, stored: Mapping[str, jax.ShapeDtypeStruct], config: Qwen25VLConfig) -> Extent:
    """How much of a model a converted folder holds, from the names and shapes of its leaves.

    Raises:
        CheckpointError: they are not those of a Qwen2.5-VL, or of one with more layers.
    """
    layers = {leaf.shape[:1] for name, leaf in stored.items() if name.startswith(LAYERS)}
    if len(layers) != 1 or layers == {()}:
        raise CheckpointError(
            "not the parameters of a Qwen2.5-VL",
            where=folder / PARAMS_ITEM,
            expected=f"leaves {LAYERS}* stacked over the layers",
            found=", ".join(list(stored)[:8]),
        )
    ((num_layers,),) = layers
    if num_layers > config.text.num_layers:
        raise CheckpointError(
            "the folder has more layers than its configuration",
            where=folder,
            expected=f"at most {config.text.num_layers}",
            found=num_layers,
        )
    return Extent(num_layers, "text.norm" in stored, any(name.startswith("vision.") for name in stored))


def require_extent(folder: Path, has: Extent, wants: Extent) -> None:
    """Refuses to take more out of a folder than it has.

    Raises:
        CheckpointError: it has less.
    """
    missing_parts = (wants.vision and not has.vision) or (wants.with_head and not has.with_head)
    if wants.num_layers > has.num_layers or missing_parts:
        raise CheckpointError(
            "the folder has less of the model than is asked for",
            where=folder,
            expected=wants,
            found=has,
            fix="ask for less (num_layers=, vision=False), or convert the published weights again with what is needed",
        )


def require_two_folders(source: Path, target: Path) -> None:
    """Refuses to write a model over its own source, around it or into it; symbolic links are followed.

    Raises:
        CheckpointError: both are one folder, or one is inside the other.
    """
    real_source, real_target = source.resolve(), target.resolve()
    if real_source == real_target:
        raise CheckpointError("a model cannot be written over its own source", where=source, fix="name another folder")
    if real_source in real_target.parents or real_target in real_source.parents:
        raise CheckpointError(
            "a model cannot be written into its own source, nor over a folder around it",
            where=target,
            expected="two folders side by side",
            found=f"{real_target}, and the source {real_source}",
            fix="name another folder",
        )


def small_files(folder: Path, dtypes: set[str]) -> dict[str, bytes]:
    """Name -> content of what belongs beside the weights.

    Args:
        folder: the model folder.
        dtypes: of the weights. If they have one alone, and config.json names another (which transformers would convert
            to when it loads them), that is corrected; all else is as it was.
    """
    paths = {path.name: path for pattern in SMALL_FILES for path in sorted(folder.glob(pattern)) if path.is_file()}
    files = {name: path.read_bytes() for name, path in paths.items() if name != INDEX_FILE}
    if len(dtypes) == 1:
        config = json.loads(files[CONFIG_FILE])
        if any([_set_dtype(section, *dtypes) for section in _sections(config)]):
            files[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def _set_dtype(section: dict[str, Any], dtype: str) -> bool:
    """False if the section named this dtype, or none, already."""
    wrong = [key for key in ("dtype", "torch_dtype") if section.get(key) not in (None, dtype)]
    section.update(dict.fromkeys(wrong, dtype))
    return bool(wrong)
