"""Datasets and mixtures of datasets, in the YAML layout of the published code.

A single dataset names its shards and instructions; a mixture names single datasets with weights. Paths are taken from
the folder of the file that names them, or else from the working directory, as the published code does.

Beyond the published layout: a mixture may mix in questions (`questions`), and needs no instructions of its own.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rdt2_data.instructions import Instructions
from rdt2_data.shards.storage import is_url
from rdt2_jax.config import FrozenConfig, find_config, load_config
from rdt2_jax.errors import ConfigError

Weight = Annotated[float, Field(gt=0)]


class DatasetKwargs(FrozenConfig):
    """`kwargs` of a dataset or a mixture.

    Attributes:
        instruction_path: key -> sentence, JSON. In a mixture it holds for all its datasets.
        normalizer_path: of the actions.
        addtional_instructions: sentences added to those of the file; spelt as published.
    """

    instruction_path: str | None = None
    normalizer_path: str | None = None
    addtional_instructions: dict[str | int, str] = Field(default_factory=dict)


class MixtureEntry(FrozenConfig):
    """One dataset of a mixture: its file, and how often it is drawn from in comparison with the others."""

    config_path: str
    weight: Weight = 1.0


class QuestionsConfig(FrozenConfig):
    """Vision-language questions mixed in: shards of them, and their share of all samples (1: nothing else)."""

    shards_dir: str
    share: Annotated[float, Field(gt=0, le=1)]


class DatasetConfig(FrozenConfig):
    """A dataset file of either kind.

    Attributes:
        name: for reports.
        type: "single"; any other word means a mixture, as in the published code.
        shards_dir: of a single dataset: folder, file or pattern (see `shards.source.open_source`).
        train: of a mixture: name -> dataset.
        questions: of a mixture.
        kwargs: instructions and normalizer.
    """

    name: str
    type: str = "single"
    shards_dir: str | None = None
    train: dict[str, MixtureEntry] = Field(default_factory=dict)
    questions: QuestionsConfig | None = None
    kwargs: DatasetKwargs = DatasetKwargs()

    @model_validator(mode="after")
    def _one_kind(self) -> DatasetConfig:
        if self.type == "single" and (self.shards_dir is None or self.train or self.questions):
            raise ValueError("a single dataset has shards_dir, and neither train nor questions")
        if self.type != "single" and (not (self.train or self.questions) or self.shards_dir is not None):
            raise ValueError("a mixture has train: {name: {config_path, weight}}, and no shards_dir")
        if self.questions is not None and (self.questions.share == 1) == bool(self.train):
            raise ValueError("questions.share is below 1 beside datasets, and 1 without any")
        return self


@dataclass(frozen=True)
class Component:
    """One set of shards that samples are drawn from.

    Attributes:
        name: for reports.
        shards: what `open_source` takes.
        weight: how often it is drawn from in comparison with the others.
        instructions: of its samples; None for questions.
    """

    name: str
    shards: str
    weight: float
    instructions: Instructions | None


@dataclass(frozen=True)
class Dataset:
    """A dataset or mixture with everything looked up.

    Attributes:
        name: of the file.
        components: one for a single dataset.
        normalizer_path: of the actions, or None.
    """

    name: str
    components: tuple[Component, ...]
    normalizer_path: str | None


def load_dataset(path: str | Path) -> Dataset:
    """Reads a dataset file, the files it names, and their instructions.

    Raises:
        ConfigError: a file that is missing or wrong, a dataset without instructions, or different normalizers.
        DataError: instructions that cannot be read.
    """
    file = find_config(path)
    config = load_config(DatasetConfig, file)
    if config.type == "single":
        component = _single(file, config, 1.0, None, {})
        return Dataset(config.name, (component,), _resolved(file, config.kwargs.normalizer_path))
    shared = None
    if config.kwargs.instruction_path is not None:
        shared = _instructions(file, config.kwargs.instruction_path)
    components: list[Component] = []
    normalizers: dict[str, str] = {}
    for name, entry in config.train.items():
        member_file = Path(_resolve(file, entry.config_path))
        if not member_file.is_file():
            where, fix = f"{file}, train.{name}.config_path", "give its path from the folder of this file"
            raise ConfigError("a dataset of the mixture is missing", where=where, found=entry.config_path, fix=fix)
        member = load_config(DatasetConfig, member_file)
        if member.type != "single":
            raise ConfigError(
                "a mixture is made of single datasets", where=f"{file}, train.{name}", found=f"type {member.type}"
            )
        more = _as_text(config.kwargs.addtional_instructions)
        components.append(_single(member_file, member, entry.weight, shared, more))
        if normalizer := _resolved(member_file, member.kwargs.normalizer_path):
            normalizers[name] = normalizer
    own = _resolved(file, config.kwargs.normalizer_path)
    if own is None and len(set(normalizers.values())) > 1:
        raise ConfigError(
            "the datasets of a mixture name different normalizers",
            where=file,
            found=normalizers,
            fix="name the one to use under kwargs.normalizer_path of the mixture",
        )
    if config.questions is not None:
        components.append(_questions(file, config.questions, components))
    return Dataset(config.name, tuple(components), own or next(iter(normalizers.values()), None))


def _single(
    file: Path, config: DatasetConfig, weight: float, shared: Instructions | None, more: Mapping[str, str]
) -> Component:
    instructions = shared
    if instructions is None:
        if config.kwargs.instruction_path is None:
            raise ConfigError("a dataset needs instructions", where=file, expected="kwargs.instruction_path")
        instructions = _instructions(file, config.kwargs.instruction_path)
    instructions = instructions.updated({**_as_text(config.kwargs.addtional_instructions), **more})
    return Component(config.name, _resolve(file, config.shards_dir or ""), weight, instructions)


def _questions(file: Path, config: QuestionsConfig, others: list[Component]) -> Component:
    beside = sum(component.weight for component in others)
    weight = beside * config.share / (1 - config.share) if others else 1.0
    return Component("questions", _resolve(file, config.shards_dir), weight, None)


def _as_text(sentences: Mapping[str | int, str]) -> dict[str, str]:
    """Keys as text, as JSON has no others."""
    return {str(key): text for key, text in sentences.items()}


def _instructions(file: Path, path: str) -> Instructions:
    return Instructions.load(_resolve(file, path))


def _resolved(file: Path, path: str | None) -> str | None:
    return None if path is None else _resolve(file, path)


def _resolve(file: Path, path: str) -> str:
    """From the folder of the file if something is there, otherwise as it stands."""
    if is_url(path) or Path(path).is_absolute():
        return path
    beside = str(file.parent / path)
    return beside if glob.glob(re.sub(r"\{[^}]*\}", "*", beside)) else path
