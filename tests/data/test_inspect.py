"""The HTML page: what it says is true, nothing of the data can run, nothing is fetched, paths lie where they should."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner
from look_shards import good_samples, write_shards
from rdt2_data.commands_look import ASSUMED_CAMERA, inspect_command
from rdt2_data.inspection.overlay import draw_paths, fingertips_policy_m, project_path, time_colour
from rdt2_data.inspection.summary import gallery, summarize
from rdt2_data.inspection.svg import Curve, curves_chart, histogram_chart
from rdt2_data.problems import SampleError
from rdt2_data.samples import COMPOSITE_SHAPE
from rdt2_data.shards.source import open_source
from rdt2_data.statistics.histogram import Histograms

from rdt2_jax.actions.layout import CHUNK_LENGTH
from rdt2_jax.cli import main
from rdt2_jax.config import load_config
from rdt2_jax.errors import DataError
from rdt2_jax.fisheye import WristCameraConfig

CAMERA = load_config(WristCameraConfig, ASSUMED_CAMERA)
CAMERAS = {"left_wrist": CAMERA, "right_wrist": CAMERA}
EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page about 30 samples, two of them broken, whose second instruction is hostile."""
    folder = tmp_path_factory.mktemp("inspect")
    samples = good_samples(30)
    samples[4]["image.jpg"] = samples[4]["image.jpg"][:500]
    samples[7]["action.npy"] = b"<img src=x onerror=alert(1)>"
    write_shards(folder / "shards", samples)
    sentences = folder / "instructions.json"
    sentences.write_text(json.dumps({"0": "Pick up the apple.", "1": EVIL, "unused": "Wave."}))
    out = folder / "page.html"
    arguments = [str(folder / "shards"), "--out", str(out), "--instructions", str(sentences)]
    result = CliRunner().invoke(inspect_command, [*arguments, "--samples", "30", "--title", EVIL, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output), out.read_text()


def test_the_page_is_whole_and_says_what_is_in_the_dataset(made):
    printed, text = made
    page = Page(text)
    words = " ".join(page.text)
    assert (printed["samples"], printed["shards"]) == (29, 3)
    reasons = printed["problems"]["reasons"]
    assert {reason: entry["count"] for reason, entry in reasons.items()} == {"corrupt-npy": 1, "corrupt-jpeg": 1}
    assert "sample 000000004, image.jpg" in reasons["corrupt-jpeg"]["examples"][0]
    for expected in ("29", "samples / 30 Hz", "Pick up the apple.", "1 of 3 instructions have no sample", "is assumed"):
        assert expected in words
    assert page.tags.count("svg") == 20 + 3 * 28  # all channels; three charts for every sample shown
    assert page.tags.count("article") == 30


def test_nothing_in_the_data_becomes_markup_and_nothing_is_fetched(made):
    _, text = made
    page = Page(text)
    assert "script" not in page.tags
    assert EVIL in "".join(page.text)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert "default-src 'none'" in page.values("meta", "content")[0]
    assert "url(" not in text
    assert "@import" not in text


def test_links_lead_somewhere(made):
    page = Page(made[1])
    names = {value for _, name, value in page.attributes if name == "id"}
    targets = {link[1:] for link in page.values("a", "href")}
    assert len(targets) == 2 * 12 + 2  # each instruction links to its first twelve samples, and they link back
    assert targets <= names


def test_pictures_are_the_samples_with_paths_in_them(made):
    page = Page(made[1])
    pictures = page.values("img", "src")
    assert len(pictures) == 28
    image = simplejpeg.decode_jpeg(base64.b64decode(pictures[0].split(",")[1]), "RGB")
    original = simplejpeg.decode_jpeg(good_samples(1)[0]["image.jpg"], "RGB")
    assert image.shape == COMPOSITE_SHAPE
    assert np.median(np.abs(image.astype(int) - original)) < 8  # most of it is as it was


def test_broken_samples_are_named_in_the_gallery(made):
    words = " ".join(Page(made[1]).text)
    assert "sample 000000004, image.jpg: the image cannot be decoded" in words
    assert "sample 000000007, action.npy: an array cannot be read" in words


def test_the_same_seed_gives_the_same_page(tmp_path):
    folder = write_shards(tmp_path / "shards", good_samples(20))
    pages, shown = [], []
    for seed in (3, 3, 4):
        out = tmp_path / "page.html"
        arguments = [str(folder), "--out", str(out), "--samples", "3", "--seed", str(seed), "--json"]
        shown.append(json.loads(CliRunner().invoke(inspect_command, arguments).output)["shown"])
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert shown[0] != shown[2]
    assert b"The sentences are not known" in pages[0]


@pytest.mark.parametrize("member", ["image.jpg", "meta.json"])
def test_strict_stops_at_a_broken_sample_also_where_only_its_image_is(member, tmp_path, capsys):
    samples = good_samples(5)
    samples[3][member] = samples[3][member][:20]
    folder, out = write_shards(tmp_path / "shards", samples), tmp_path / "page.html"
    with pytest.raises(SystemExit) as stopped:
        main(["data", "inspect", str(folder), "--out", str(out), "--strict"])
    assert stopped.value.code == 2
    assert f"sample 000000003, {member}" in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_image_is_counted_once_and_a_sample_that_cannot_be_read_not_twice(tmp_path):
    samples = good_samples(6)
    del samples[2]["image.jpg"]
    source = FailingSource(open_source(write_shards(tmp_path, samples)), whole={1}, image={4})
    summary = summarize(source, [str(tmp_path / "shard-000000.tar")], None)
    assert source.tally.counts() == {"read-error": 1}
    shown = gallery(source, 6, 0, CAMERAS)
    assert [sample.problem is None for sample in shown] == [True, False, False, True, False, True]
    assert summary.statistics.tally.counts() == {"read-error": 2, "missing-member": 1}


class FailingSource:
    """A source that cannot read some samples at all, and some others only without their images."""

    def __init__(self, source, whole: set[int], image: set[int]) -> None:
        self.source, self.tally, self.whole, self.image = source, source.tally, whole, image

    def __len__(self) -> int:
        return len(self.source)

    def locate(self, index: int) -> tuple[str, int]:
        return self.source.locate(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def read(self, indices, members=None):
        with_image = members is None or "image.jpg" in members
        failing = self.whole | (self.image if with_image else set())
        read = self.source.read(indices, members)
        return [
            SampleError("read-error", where=f"number {i}") if i in failing else raw
            for i, raw in zip(indices, read, strict=True)
        ]


def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path):
    camera = tmp_path / "small.yaml"
    small = CAMERA.model_dump(mode="json")
    small["intrinsics"]["width"] = 200
    camera.write_text(json.dumps(small))
    for more, message in (
        (["--out", str(tmp_path / "missing" / "page.html")], "an existing folder"),
        (["--out", str(tmp_path / "page.txt")], "ending in .html"),
        (["--out", str(tmp_path / "page.html"), "--camera-right", str(camera)], "not of these images"),
    ):
        result = CliRunner().invoke(inspect_command, ["no shards here", *more])
        assert isinstance(result.exception, DataError)
        assert message in str(result.exception)


# ------------------------------------------------------------------------------------------------ overlay


def still_chunk(width: float = 0.04) -> np.ndarray:
    """Both arms stand still."""
    frame = np.zeros(20, np.float32)
    for start in (0, 10):
        frame[start + 3] = frame[start + 7] = 1
        frame[start + 9] = width
    return np.tile(frame, (CHUNK_LENGTH, 1))


def test_an_arm_that_stands_still_stays_at_its_fingertips():
    path = project_path(still_chunk(), "right", CAMERA)
    at, visible = CAMERA.project(fingertips_policy_m())
    assert visible
    assert path.visible.all()
    np.testing.assert_allclose(path.middle, np.tile(at, (CHUNK_LENGTH + 1, 1)), atol=1e-6)
    # the jaws open along x, which is across in the picture, as far as the gripper is open
    apart = path.jaws[:, 1] - path.jaws[:, 0]
    assert (apart[:, 0] > 5).all()
    np.testing.assert_allclose(apart[:, 1], 0, atol=1e-6)
    wider = project_path(still_chunk(0.08), "right", CAMERA)
    assert (wider.jaws[:, 1, 0] - wider.jaws[:, 0, 0] > apart[:, 0]).all()


def test_motion_to_the_right_and_down_goes_right_and_down_in_the_arms_own_image():
    chunk = still_chunk()
    chunk[:, 10] = np.linspace(0, 0.1, CHUNK_LENGTH)  # left arm along x
    chunk[:, 1] = np.linspace(0, 0.1, CHUNK_LENGTH)  # right arm along y, towards the fingers' side
    left, right = project_path(chunk, "left", CAMERA), project_path(chunk, "right", CAMERA)
    assert (np.diff(left.middle[1:, 0]) > 0).all()
    assert np.ptp(left.middle[:, 1]) < 5
    assert (np.diff(right.middle[1:, 1]) > 0).all()
    assert np.ptp(right.middle[:, 0]) < 1e-6
    blank = np.zeros(COMPOSITE_SHAPE, np.uint8)
    picture, seen = draw_paths(blank, chunk, CAMERAS)
    assert seen == {"left": CHUNK_LENGTH, "right": CHUNK_LENGTH}
    half = COMPOSITE_SHAPE[1] // 2
    drawn_left = np.argwhere(picture[:, :half].max(axis=-1) > 120)
    drawn_right = np.argwhere(picture[:, half:].max(axis=-1) > 120)
    assert np.ptp(drawn_left[:, 1]) > np.ptp(drawn_left[:, 0])
    assert np.ptp(drawn_right[:, 0]) > 30


def test_a_path_out_of_sight_is_not_drawn_and_is_said_so():
    chunk = still_chunk()
    chunk[:, [2, 12]] = -5.0  # far behind the camera
    picture, seen = draw_paths(np.zeros(COMPOSITE_SHAPE, np.uint8), chunk, CAMERAS)
    assert seen == {"left": 0, "right": 0}
    assert (picture.max(axis=-1) > 120).sum() < 800  # the fingers as they are now, and no line


def test_a_camera_of_another_size_is_refused():
    small = CAMERA.model_copy(update={"intrinsics": CAMERA.intrinsics.model_copy(update={"width": 200})})
    with pytest.raises(DataError, match="not of these images"):
        draw_paths(np.zeros(COMPOSITE_SHAPE, np.uint8), still_chunk(), {**CAMERAS, "right_wrist": small})


def test_colours_run_from_start_to_end():
    assert time_colour(0.0) == (0, 180, 255)
    assert time_colour(1.0) == (255, 45, 85)
    assert len({time_colour(share) for share in np.linspace(0, 1, 25)}) == 25


def test_charts_survive_flat_data_and_hostile_titles():
    flat = Curve("a", "#000", np.zeros(5))
    chart = curves_chart(EVIL, [flat], times_s=np.arange(1.0, 6.0), least_span=1.0)
    histograms = Histograms(1)
    histograms.update(np.full((9, 1), 0.25))
    charts = [chart, histogram_chart(EVIL, histograms.channel(0), mean=0.25, colour="#000")]
    histograms.update(np.full((2, 1), 1e13))  # and values that no action has
    charts.append(histogram_chart(EVIL, histograms.channel(0), mean=2e12, colour="#000"))
    alone = Histograms(1)
    alone.update(np.full((2, 1), 1e13))
    charts.append(histogram_chart(EVIL, alone.channel(0), mean=1e13, colour="#000"))
    for text in charts[2:]:
        assert "2 values beyond" in text
    for text in charts:
        assert "script" not in Page(text).tags
        assert "nan" not in text
