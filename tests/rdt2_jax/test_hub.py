"""Models by name: folders first, then the hub; without a network, and with errors that say what to put where."""

from __future__ import annotations

import builtins
import fnmatch
import importlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from rdt2_jax.errors import CheckpointError, MissingExtraError
from rdt2_jax.hub import model_folder
from rdt2_jax.qwen2_5_vl.folder import find_preprocessor

NEEDS = ("config.json", "*.safetensors")


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub whose repositories all have the same files; returns the calls that it got."""
    calls: list[dict[str, Any]] = []
    files = ("config.json", "model.safetensors", "pytorch_model.bin", "normalizer.pt", "notes.md")

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        chosen = [f for f in files if any(fnmatch.fnmatch(f, p) for p in options["allow_patterns"] or "*")]
        chosen = [f for f in chosen if not any(fnmatch.fnmatch(f, p) for p in options["ignore_patterns"])]
        return str(fill(tmp_path / "cache" / repository, *chosen))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    http = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co/a/b"))
    return kind(f"{status} for a/b", response=response)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


class TestFolders:
    def test_a_folder_is_itself_and_the_hub_is_not_asked(self, hub, tmp_path, monkeypatch):
        folder = fill(tmp_path / "org" / "model", "config.json", "model-00001-of-00001.safetensors")
        assert model_folder(folder, needs=NEEDS) == folder
        assert model_folder(str(folder)) == folder
        monkeypatch.chdir(tmp_path)
        assert model_folder("org/model", needs=NEEDS) == Path("org/model")  # it could be a hub name, but it is here
        assert hub == []

    def test_home(self, hub, tmp_path, monkeypatch):
        fill(tmp_path / "model")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert model_folder("~/model") == tmp_path / "model"

    def test_missing_files_are_listed(self, tmp_path):
        folder = fill(tmp_path / "model", "vocab.json")
        with pytest.raises(CheckpointError, match=r"expected: config.json, \*.safetensors\n  found: vocab.json\n  fix"):
            model_folder(folder, needs=(*NEEDS, "*.json"))
        with pytest.raises(CheckpointError, match="found: an empty folder"):
            model_folder(fill(tmp_path / "empty"), needs=NEEDS)

    def test_folders_do_not_count_as_files(self, tmp_path):
        folder = fill(tmp_path / "model", "model.safetensors")
        (folder / "config.json").mkdir()
        with pytest.raises(CheckpointError, match=r"expected: config.json\n"):
            model_folder(folder, needs=NEEDS)

    @pytest.mark.parametrize("name", ["model", "/no/such/folder", "./org/model", "a/b/c", "org/", "org/model@", ""])
    def test_neither_folder_nor_hub_name(self, hub, tmp_path, monkeypatch, name):
        monkeypatch.chdir(fill(tmp_path))
        with pytest.raises(CheckpointError, match="not a name on the hub") as error:
            model_folder(name)
        assert error.value.found == "no such folder"
        assert error.value.where == name
        assert hub == []

    def test_a_file_is_not_a_folder(self, hub, tmp_path):
        fill(tmp_path, "model.safetensors")
        with pytest.raises(CheckpointError, match="found: a file"):
            model_folder(tmp_path / "model.safetensors")
        assert hub == []


class TestHub:
    def test_only_what_is_asked_for_is_fetched(self, hub):
        folder = model_folder("org/model-1.0", needs=NEEDS)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert hub[0]["repository"] == "org/model-1.0"
        assert hub[0]["revision"] is None

    def test_a_revision(self, hub):
        model_folder("org/model@refs/pr/1", needs=NEEDS)
        assert (hub[0]["repository"], hub[0]["revision"]) == ("org/model", "refs/pr/1")

    def test_pickles_come_only_by_name(self, hub):
        assert not list(model_folder("org/all", needs=("*",)).glob("*.bin"))
        assert not list(model_folder("org/all", needs=("*",)).glob("*.pt"))
        folder = model_folder("org/named", needs=("normalizer.pt",))
        assert [path.name for path in folder.iterdir()] == ["normalizer.pt"]

    def test_everything_but_pickles_by_default(self, hub):
        assert {path.name for path in model_folder("org/model").iterdir()} == {
            "config.json",
            "model.safetensors",
            "notes.md",
        }

    def test_what_is_wanted_need_not_be_there(self, hub):
        folder = model_folder("org/model", needs=("config.json",), wants=("*.md", "*.jinja"))
        assert {path.name for path in folder.iterdir()} == {"config.json", "notes.md"}

    def test_a_repository_without_the_files(self, hub):
        with pytest.raises(CheckpointError, match=r"files of a model are missing(.|\n)*expected: tokenizer.json"):
            model_folder("org/model", needs=("config.json", "tokenizer.json"))

    def test_no_such_repository(self, monkeypatch):
        failing(monkeypatch, http_error(errors.RepositoryNotFoundError, 404))
        with pytest.raises(CheckpointError, match=r"no such repository(.|\n)*where: org/modle(.|\n)*spelling"):
            model_folder("org/modle")

    def test_terms_to_accept(self, monkeypatch):
        failing(monkeypatch, http_error(errors.GatedRepoError, 403))
        with pytest.raises(CheckpointError, match=r"accepted its terms(.|\n)*hf auth login"):
            model_folder("org/model")

    def test_no_such_revision(self, monkeypatch):
        failing(monkeypatch, http_error(errors.RevisionNotFoundError, 404))
        with pytest.raises(CheckpointError, match=r"no such revision(.|\n)*found: v9"):
            model_folder("org/model@v9")

    @pytest.mark.parametrize(
        "error",
        [
            http_error(errors.HfHubHTTPError, 503),
            errors.LocalEntryNotFoundError("nothing cached"),
            errors.OfflineModeIsEnabled("offline"),
            ConnectionResetError("reset"),
            TimeoutError(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_unreachable(self, monkeypatch, error):
        failing(monkeypatch, error)
        with pytest.raises(CheckpointError, match="the hub did not give the model") as caught:
            model_folder("org/model@v1", needs=NEEDS)
        message = str(caught.value)
        assert "a local folder with config.json, *.safetensors" in message
        assert "hf download org/model --revision v1 --local-dir model" in message
        assert "./model" in message
        assert type(error).__name__ in message
        assert caught.value.__cause__ is error

    def test_a_full_disk_is_not_called_a_missing_connection(self, monkeypatch):
        failing(monkeypatch, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            model_folder("org/model")

    def test_the_real_client_offline(self, monkeypatch, tmp_path):
        """No stand-in: the hub's own client, told to be offline, with an empty cache and then with a filled one."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(CheckpointError, match=r"the hub did not give the model(.|\n)*LocalEntryNotFoundError"):
            model_folder("org/model", needs=NEEDS)
        commit = "0" * 40
        cached = tmp_path / "models--org--model"
        fill(cached / "snapshots" / commit, "config.json", "model.safetensors")
        fill(cached / "refs")
        (cached / "refs" / "main").write_text(commit)
        assert model_folder("org/model", needs=NEEDS) == cached / "snapshots" / commit
        with pytest.raises(CheckpointError, match="files of a model are missing"):
            model_folder("org/model", needs=(*NEEDS, "tokenizer.json"))

    def test_without_the_library(self, monkeypatch):
        real_import = builtins.__import__

        def no_hub(name: str, *arguments: Any, **options: Any) -> Any:
            if name.startswith("huggingface_hub"):
                raise ModuleNotFoundError(f"No module named {name}", name=name)
            return real_import(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", no_hub)
        with pytest.raises(MissingExtraError, match=r"pip install 'rdt2-jax\[model\]'"):
            model_folder("org/model")


class TestPreprocessor:
    """What a preprocessor is made of comes without the weights."""

    FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")

    def test_a_folder(self, hub, tmp_path):
        folder = fill(tmp_path / "model", *self.FILES)
        assert find_preprocessor(folder) == folder
        (folder / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"files of a model are missing(.|\n)*expected: tokenizer.json"):
            find_preprocessor(folder)
        assert hub == []

    def test_a_hub_name(self, monkeypatch, tmp_path):
        asked: list[Any] = []

        def snapshot_download(repository: str, **options: Any) -> str:
            asked.append((repository, options["revision"], sorted(options["allow_patterns"])))
            return str(fill(tmp_path / "cache", *options["allow_patterns"]))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert find_preprocessor("org/model@v2") == tmp_path / "cache"
        assert asked == [("org/model", "v2", sorted(self.FILES))]

    def test_a_repository_without_them(self, hub):
        with pytest.raises(CheckpointError, match=r"expected: tokenizer.json, preprocessor_config.json"):
            find_preprocessor("org/model")
