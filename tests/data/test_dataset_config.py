"""Dataset files in the published layout."""

from __future__ import annotations

import json

import pytest
import yaml
from rdt2_data.dataset_config import load_dataset
from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError
from rdt2_data.shards.source import open_source
from small_shards import SENTENCES, write_dataset

from rdt2_jax.errors import ConfigError, DataError


def write(path, document):
    path.write_text(yaml.safe_dump(document))
    return path


def mixture(folder, **changes):
    """Two datasets, three samples of the first for one of the second."""
    first, second = write_dataset(folder / "first"), write_dataset(folder / "second")
    document = {
        "name": "both",
        "type": "mixture",
        "train": {
            "first": {"config_path": "first/dataset.yaml", "weight": 3},
            "second": {"config_path": str(second), "weight": 1.0},
        },
    }
    assert first.is_file()
    return write(folder / "mixture.yaml", document | changes)


def test_single(tmp_path):
    dataset = load_dataset(write_dataset(tmp_path / "apples"))
    (component,) = dataset.components
    assert (dataset.name, component.name, component.weight) == ("apples", "apples", 1.0)
    assert len(open_source(component.shards)) == 10
    assert component.instructions is not None
    assert dict(component.instructions) == SENTENCES


def test_paths_from_the_working_directory(tmp_path, monkeypatch):
    """As the published code takes them."""
    write_dataset(tmp_path / "apples")
    (tmp_path / "configs").mkdir()
    kwargs = {"instruction_path": "apples/instructions.json", "normalizer_path": "n.pt"}
    document = {"name": "x", "type": "single", "shards_dir": "apples/shards/shard-{000000..000001}.tar"}
    file = write(tmp_path / "configs/x.yaml", document | {"kwargs": kwargs})
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset(file)
    assert len(open_source(dataset.components[0].shards)) == 10
    assert dataset.normalizer_path == "n.pt"


def test_mixture(tmp_path):
    dataset = load_dataset(mixture(tmp_path))
    assert [(c.name, c.weight) for c in dataset.components] == [("first", 3.0), ("second", 1.0)]


def test_instructions_of_a_mixture(tmp_path):
    """Its own file holds for all, and more sentences are added or put in place, under the published spelling."""
    (tmp_path / "own.json").write_text(json.dumps({"0": "Push.", "1": "Pull."}))
    kwargs = {"instruction_path": "own.json", "addtional_instructions": {"1": "Lift.", "7": "Turn."}}
    dataset = load_dataset(mixture(tmp_path, kwargs=kwargs))
    for component in dataset.components:
        assert dict(component.instructions or {}) == {"0": "Push.", "1": "Lift.", "7": "Turn."}
    more = {"addtional_instructions": {"1": "Lift."}}
    dataset = load_dataset(mixture(tmp_path, kwargs=more))
    assert dict(dataset.components[0].instructions or {}) == SENTENCES | {"1": "Lift."}


def test_questions_get_their_share(tmp_path):
    questions = {"shards_dir": "questions", "share": 0.2}
    (tmp_path / "questions").mkdir()
    dataset = load_dataset(mixture(tmp_path, questions=questions))
    weights = [component.weight for component in dataset.components]
    assert weights[2] / sum(weights) == pytest.approx(0.2)
    assert dataset.components[2].instructions is None


def test_questions_alone(tmp_path):
    (tmp_path / "questions").mkdir()
    document = {"name": "q", "type": "blend", "questions": {"shards_dir": "questions", "share": 1}}
    (component,) = load_dataset(write(tmp_path / "q.yaml", document)).components
    assert (component.weight, component.instructions) == (1.0, None)


def test_keys_may_be_numbers(tmp_path):
    """As in `meta.json`, where they are either."""
    dataset = load_dataset(mixture(tmp_path, kwargs={"addtional_instructions": {7: "Turn."}}))
    assert (dataset.components[0].instructions or {})["7"] == "Turn."


def test_an_empty_file_of_instructions_holds_for_all(tmp_path):
    (tmp_path / "none.json").write_text("{}")
    dataset = load_dataset(mixture(tmp_path, kwargs={"instruction_path": "none.json"}))
    assert dataset.components[0].instructions == {}


def test_missing_members_name_the_mixture(tmp_path):
    document = {"name": "x", "type": "mixture", "train": {"a": {"config_path": "gone.yaml"}}}
    with pytest.raises(ConfigError, match=r"x\.yaml, train\.a\.config_path"):
        load_dataset(write(tmp_path / "x.yaml", document))


def test_normalizers_must_agree(tmp_path):
    file = mixture(tmp_path)
    for name in ("first", "second"):
        path = tmp_path / name / "dataset.yaml"
        document = yaml.safe_load(path.read_text())
        document["kwargs"]["normalizer_path"] = f"{name}.npz"
        write(path, document)
    with pytest.raises(ConfigError, match="different normalizers"):
        load_dataset(file)
    document = yaml.safe_load(file.read_text()) | {"kwargs": {"normalizer_path": "both.npz"}}
    assert load_dataset(write(file, document)).normalizer_path == "both.npz"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"name": "x", "type": "single"}, "shards_dir"),
        ({"name": "x", "type": "mixture", "train": {}}, "train"),
        ({"name": "x", "type": "single", "shards_dir": "s", "questions": {"shards_dir": "q", "share": 0.1}}, "neither"),
        ({"name": "x", "type": "single", "shard_dir": "s"}, "did you mean 'shards_dir'"),
        ({"name": "x", "type": "mixture", "train": {"a": {"config_path": "a", "weight": 0}}}, "train.a.weight"),
        ({"name": "x", "type": "mixture", "questions": {"shards_dir": "q", "share": 0.5}}, "share"),
        ({"name": "x", "type": "single", "shards_dir": "s"}, "instruction_path"),
        ({"name": "x", "type": "single", "shards_dir": "s", "kwargs": {"instruction_path": "no.json"}}, "no.json"),
    ],
)
def test_mistakes_are_named(tmp_path, document, message):
    with pytest.raises((ConfigError, DataError), match=message):
        load_dataset(write(tmp_path / "x.yaml", document))


def test_a_mixture_of_mixtures_is_refused(tmp_path):
    inner = mixture(tmp_path)
    document = {"name": "outer", "type": "mixture", "train": {"inner": {"config_path": str(inner)}}}
    with pytest.raises(ConfigError, match=r"train\.inner"):
        load_dataset(write(tmp_path / "outer.yaml", document))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"0": 3}', '{"0": "  "}'])
def test_bad_instructions(tmp_path, text):
    path = tmp_path / "instructions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"instructions\.json"):
        Instructions.load(path)


def test_unknown_key_names_the_sample():
    with pytest.raises(SampleError) as caught:
        Instructions(SENTENCES, "i.json").text("9", "shard 1, sample 2")
    assert caught.value.reason == "unknown-instruction"
    assert "shard 1, sample 2" in caught.value.line()
