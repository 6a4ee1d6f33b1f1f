"""Frozen typed configurations: YAML in, one clear error out.

A configuration is a frozen pydantic model that refuses unknown keys. `load_config` reads a file found by
`find_config` (a path, a name inside the repository's `configs/`, or the copy packed into the wheel), applies
`key.sub=value` overrides, and turns whatever is wrong into one ConfigError that names file, key and likely meaning.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from rdt2_jax.errors import ConfigError

_REPOSITORY = Path(__file__).parent.parent
_PACKAGED_CONFIGS = Path(__file__).parent / "_configs"


class FrozenConfig(pydantic.BaseModel):
    """Base of all configurations: immutable, hashable (usable as a static argument of jit), no unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


PositiveInt = Annotated[int, pydantic.Field(ge=1)]

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


def config_folders() -> list[Path]:
    """Folders searched for named configurations, first match wins."""
    # In an installed wheel the folder above belongs to everybody, and a `configs` in it to somebody else.
    repository = [_REPOSITORY / "configs"] if (_REPOSITORY / "pyproject.toml").is_file() else []
    return [folder for folder in (*repository, _PACKAGED_CONFIGS) if folder.is_dir()]


def find_config(name: str | Path) -> Path:
    """Resolves a configuration: an existing path, else `configs/<name>` of the repository, else the packaged copy.

    A leading `configs/` is allowed, so that commands copied from the README work from any folder.

    Raises:
        ConfigError: nothing of that name exists; lists what is there.
    """
    path = Path(name)
    if path.is_file():
        return path
    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for folder in config_folders():
        if not path.is_absolute() and (folder / relative).is_file():
            return folder / relative
    known = sorted({str(f.relative_to(folder)) for folder in config_folders() for f in folder.rglob("*.yaml")})
    close = difflib.get_close_matches(str(relative), known, n=3, cutoff=0.5)
    raise ConfigError(
        "no such configuration file",
        where=name,
        expected="a path, or one of: " + ", ".join(known),
        fix=f"did you mean {' or '.join(close)}?" if close else None,
    )


def load_config(model: type[ConfigT], name: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file into `model`, after applying overrides of the form `key.sub=value` (value in YAML).

    Raises:
        ConfigError: missing or unreadable file, duplicate or unknown keys, values of the wrong type or range.
    """
    path = find_config(name)
    try:
        values = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("not a readable YAML file", where=path, found=str(error)) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("a configuration must be a mapping", where=path, found=type(values).__name__)
    for override in overrides:
        _apply_override(values, override)
    return parse_config(model, values, where=str(path))


def parse_config(model: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """Validates a mapping; every problem is reported in one ConfigError naming `where` and the keys."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_describe(problem, model) for problem in error.errors()]
        raise ConfigError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in a configuration",
            where=where,
            found="; ".join(problems),
        ) from error


def _describe(problem: Any, model: type[FrozenConfig]) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "(top level)"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f", did you mean '{close[0]}'?" if close else f", known keys: {', '.join(known)}"
        return f"unknown key '{key}'{hint}"
    if problem["type"] == "missing":
        return f"missing key '{key}'"
    return f"'{key}': {problem['msg']}, found {problem['input']!r}"


def _known_keys(model: type[FrozenConfig], location: tuple[Any, ...]) -> list[str]:
    """Field names of the (possibly nested) model at a location of a validation error."""
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", {})
        current = fields[part].annotation if part in fields else None
    return sorted(getattr(current, "model_fields", {}))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("an override must look like key.sub=value", where=override)
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError("the value of an override is not YAML", where=override, found=str(error)) from error
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError("an override reaches into a value that has no keys", where=override, found=parent)
    target[last] = value


def dump_config(config: FrozenConfig) -> str:
    """The configuration as JSON text, to be kept beside what was made with it."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and reads `1e-4` as a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if node.style is None and any(c in text for c in "eE"):
            try:
                return float(text)
            except ValueError:
                return text
        return text


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:str", _UniqueKeyLoader.construct_yaml_str)
