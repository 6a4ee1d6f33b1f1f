"""The training stream: one order for one seed, taken up at any step by any number of hosts, bad samples replaced."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml
from rdt2_data.dataset_config import load_dataset
from rdt2_data.pipeline.letterbox import letterbox
from rdt2_data.pipeline.stream import Host, StreamConfig, TrainingStream
from rdt2_data.problems import SampleError
from rdt2_data.samples import Turn, decode_image
from rdt2_data.shards.pack import PackOptions, pack
from rdt2_data.shards.source import open_source
from small_shards import SENTENCES, chunks, jpeg, question, sample, write_dataset, write_shards

from rdt2_jax.errors import ConfigError, DataError


def stream(file, batch_size=4, *, host=None, encoder=None, corrupt=None, **options):
    config = StreamConfig(batch_size=batch_size, **options)
    return TrainingStream(load_dataset(file), config, host=host or Host(), encoder=encoder, corrupt=corrupt)


def digest(batch):
    """Everything in a batch, as one text."""
    parts = [getattr(batch, name) for name in sorted(vars(batch)) if name not in ("texts", "text")]
    parts += [] if batch.text is None else list(vars(batch.text).values())
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + repr(batch.texts).encode()).hexdigest()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def numbers(batches):
    return [int(number) for batch in batches for number in batch.sample[:, 1]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 samples in three shards."""
    folder = tmp_path_factory.mktemp("dataset")
    file = write_dataset(folder, shards=2, samples=8)
    write_shards(folder / "more", shards=1, samples=7, first=16)
    (folder / "more/shard-000000.tar").rename(folder / "shards/shard-000002.tar")
    return file


@pytest.fixture(scope="module")
def mixed(dataset, tmp_path_factory):
    """That dataset, another of six samples, and a fifth of questions."""
    folder = tmp_path_factory.mktemp("mixed")
    other = write_dataset(folder / "other", shards=1, samples=6, first=500)
    write_shards(folder / "questions", shards=1, samples=5, make=question)
    document = {
        "name": "mixed",
        "type": "mixture",
        "train": {
            "first": {"config_path": str(dataset), "weight": 3},
            "other": {"config_path": str(other), "weight": 1},
        },
        "questions": {"shards_dir": "questions", "share": 0.2},
    }
    file = folder / "mixed.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def test_a_batch_holds_its_samples(dataset):
    (batch,) = take(stream(dataset, 6), 1)
    assert batch.image.shape == (6, 384, 768, 3)
    source = open_source(dataset.parent / "shards")
    for row, number in enumerate(batch.sample[:, 1]):
        (raw,) = source.read([int(number)])
        assert np.array_equal(batch.image[row], decode_image(raw))
        assert np.array_equal(batch.action[row], chunks(64)[number % 64])
        assert np.all(batch.action_token[row] == number)
        assert batch.texts[row] == SENTENCES[str(number % 3)]
    assert batch.is_action.all()
    assert batch.has_tokens.all()
    assert batch.valid.all()
    assert not batch.replaced.any()
    assert not batch.state.any()


def test_same_seed_same_stream(dataset):
    one, two, other = (
        take(stream(dataset, seed=seed, threads=threads), 9) for seed, threads in ((1, 1), (1, 4), (2, 2))
    )
    assert [digest(batch) for batch in one] == [digest(batch) for batch in two]
    assert numbers(one) != numbers(other)


def test_every_epoch_holds_every_sample_in_an_order_of_its_own(dataset):
    found = numbers(take(stream(dataset, 23), 3))
    epochs = [found[:23], found[23:46], found[46:]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_without_shuffling(dataset):
    assert numbers(stream(dataset, 4, shuffle=False, epochs=1)) == list(range(20))


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_sample_once(dataset, hosts):
    parts = [
        stream(dataset, 4, shuffle=False, epochs=1, last_batch="pad", host=Host(index, hosts)) for index in range(hosts)
    ]
    assert {part.num_steps for part in parts} == {6}
    seen = [int(number) for part in parts for batch in part for number in batch.sample[batch.valid, 1]]
    assert sorted(seen) == list(range(23))


def test_epochs_end(dataset):
    iterator = iter(stream(dataset, 5, epochs=2))
    assert len(take(iterator, 100)) == 9
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("kind", ["single", "mixture"])
def test_restored_at_every_step(dataset, mixed, kind):
    """The state of every step gives the identical remaining stream: images, actions, texts, keys."""
    file, options, count = (dataset, {"epochs": 2}, 11) if kind == "single" else (mixed, {}, 12)
    iterator = iter(stream(file, 4, **options))
    batches, states = [], [iterator.get_state()]
    for batch in itertools.islice(iterator, count):
        batches.append(digest(batch))
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert len(batches) == count
    for step, state in enumerate(states):
        again = iter(stream(file, 4, threads=1 + step % 3, **options))
        again.set_state(state)
        assert [digest(batch) for batch in itertools.islice(again, count - step)] == batches[step:]
        if kind == "single":
            assert next(again, None) is None


def test_a_mixture_has_no_passes(mixed):
    with pytest.raises(ConfigError, match="no passes"):
        stream(mixed, 4, epochs=1)


def test_state_does_not_run_ahead_of_what_was_handed_out(dataset):
    iterator = iter(stream(dataset, 2, threads=3, prefetch=6))
    for step in range(4):
        assert iterator.get_state()["position"] == 2 * step
        next(iterator)


def test_another_number_of_hosts_goes_on_exactly(mixed):
    """Rows of all hosts, one below the other, are the rows of one host; also after a restart with other hosts."""
    whole = iter(stream(mixed, 6))
    expected = take(whole, 3)
    state = whole.get_state()
    rest = take(whole, 3)
    for hosts in (2, 3, 6):
        parts = [iter(stream(mixed, 6, host=Host(index, hosts))) for index in range(hosts)]
        for batch in expected:
            own = [next(part) for part in parts]
            assert np.array_equal(np.concatenate([part.image for part in own]), batch.image)
            assert np.array_equal(np.concatenate([part.key for part in own]), batch.key)
        assert {json.dumps(part.get_state()) for part in parts} == {json.dumps(state)}
    parts = [iter(stream(mixed, 6, host=Host(index, 3))) for index in range(3)]
    for part in parts:
        part.set_state(state)
    for batch in rest:
        assert np.array_equal(np.concatenate([next(part).action for part in parts]), batch.action)


def test_another_batch_size_goes_on_exactly_or_says_no(dataset):
    iterator = iter(stream(dataset, 6))
    take(iterator, 2)
    state = iterator.get_state()
    expected = numbers(take(iterator, 4))
    other = iter(stream(dataset, 4))
    other.set_state(state)
    assert numbers(take(other, 6)) == expected
    with pytest.raises(DataError, match="within a batch"):
        iter(stream(dataset, 5)).set_state(state)


def test_states_of_other_streams_are_refused(dataset, mixed):
    state = iter(stream(dataset)).get_state()
    for other in (stream(dataset, seed=1), stream(dataset, shuffle=False), stream(mixed), stream(dataset, epochs=3)):
        with pytest.raises(DataError, match="another stream"):
            iter(other).set_state(state)
    for damaged in ({}, state | {"version": 2}, state | {"extra": 1}, None, [1], "x"):
        with pytest.raises(DataError, match="no state"):
            iter(stream(dataset)).set_state(damaged)
    ended = stream(dataset, epochs=1)
    for position in (-4, 2.0, 1e30, "x", None, True, 24):
        with pytest.raises(DataError, match="outside the stream"):
            iter(ended).set_state(iter(ended).get_state() | {"position": position})


def test_other_sentences_are_another_stream(tmp_path):
    file = write_dataset(tmp_path / "x")
    state = iter(stream(file)).get_state()
    (tmp_path / "x/instructions.json").write_text(json.dumps(SENTENCES | {"0": "Pick up the pear."}))
    with pytest.raises(DataError, match="another stream"):
        iter(stream(file)).set_state(state)


def test_hosts_can_tell_that_they_see_other_shards(dataset, tmp_path):
    shutil.copytree(dataset.parent, tmp_path / "copy")
    shard = tmp_path / "copy/shards/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    same = stream(dataset, host=Host(1, 2)).fingerprint()
    assert stream(dataset, host=Host(0, 2)).fingerprint() == same
    assert stream(tmp_path / "copy/dataset.yaml", host=Host(0, 2)).fingerprint() != same


def test_hosts_that_cannot_share_a_batch(dataset):
    with pytest.raises(ConfigError, match="multiple of 3"):
        stream(dataset, 4, host=Host(0, 3))
    with pytest.raises(ConfigError, match="no such host"):
        stream(dataset, 4, host=Host(2, 2))


def test_mixture_keeps_its_weights(mixed):
    batches = take(stream(mixed, 40), 10)
    drawn = Counter(int(component) for batch in batches for component in batch.sample[:, 0])
    assert drawn[0] / 400 == pytest.approx(0.6, abs=0.01)
    assert drawn[1] / 400 == pytest.approx(0.2, abs=0.01)
    assert drawn[2] / 400 == pytest.approx(0.2, abs=0.01)
    first = [int(n) for b in batches for c, n in b.sample if c == 0]
    assert set(first) == set(range(23))


def test_questions_have_the_shape_of_the_rest(mixed):
    (batch,) = take(stream(mixed, 20), 1)
    rows = np.flatnonzero(~batch.is_action)
    assert len(rows) == 4
    for row in rows:
        number = int(batch.sample[row, 1])
        assert batch.texts[row] == (Turn(f"What is number {number}?", f"It is {number}."), Turn("Sure?", "Yes."))
        assert not batch.action[row].any()
        assert (batch.action_token[row] == -1).all()
        assert not batch.has_tokens[row]
        assert batch.image[row, :, 384].any()
        assert not batch.image[row, :, :100].any()


def test_keys_differ_between_samples_epochs_and_seeds(dataset):
    keys = [tuple(key) for batch in take(stream(dataset, 23), 4) for key in batch.key.tolist()]
    keys += [tuple(key) for batch in take(stream(dataset, 23, seed=1), 4) for key in batch.key.tolist()]
    assert len(set(keys)) == 8 * 23


def test_samples_without_tokens(tmp_path):
    file = write_dataset(tmp_path / "x", make=lambda n: sample(n, tokens=False, state=np.full(20, n, np.float32)))
    (batch,) = take(stream(file), 1)
    assert not batch.has_tokens.any()
    assert (batch.action_token == -1).all()
    assert np.array_equal(batch.state[:, 0], batch.sample[:, 1])


def test_unmeasured_widths_are_told(tmp_path):
    def make(number):
        stated = {"gripper_valid": {"right": False, "left": True}} if number == 3 else {}
        return sample(number, meta=stated)

    (batch,) = take(stream(write_dataset(tmp_path / "x", make=make), 10, epochs=1), 1)
    rows = batch.sample[:, 1]
    assert np.array_equal(batch.gripper_valid, np.stack([rows != 3, np.ones(10, bool)], axis=1))
    for wrong in ({"right": 1, "left": True}, {"right": True}, True):
        file = write_dataset(
            tmp_path / "y", make=lambda n, w=wrong: sample(n, meta={"gripper_valid": w} if n == 3 else {})
        )
        found = stream(file, 10, epochs=1)
        take(found, 1)
        assert found.tally.counts() == {"bad-meta": 1}


def test_both_containers_give_the_same_samples(dataset, tmp_path):
    pack(dataset.parent / "shards", tmp_path / "records", PackOptions("array_record", 5))
    document = yaml.safe_load(dataset.read_text()) | {"shards_dir": str(tmp_path / "records")}
    document["kwargs"]["instruction_path"] = str(dataset.parent / "instructions.json")
    (tmp_path / "records.yaml").write_text(yaml.safe_dump(document))
    one, two = take(stream(dataset), 3), take(stream(tmp_path / "records.yaml"), 3)
    assert [digest(batch) for batch in one] == [digest(batch) for batch in two]


class TestBadSamples:
    """They are replaced by others, counted and named; the order of the rest does not change."""

    @pytest.fixture
    def damaged(self, tmp_path):
        def make(number):
            members = sample(number)
            if number == 3:
                members["image.jpg"] = jpeg(0)[:500]
            if number == 11:
                members["meta.json"] = b'{"sub_task_instruction_key": 99}'
            return members

        return write_dataset(tmp_path / "x", shards=2, samples=8, make=make)

    def test_replaced_and_counted(self, damaged):
        found = stream(damaged, 8, epochs=1)
        iterator = iter(found)
        batches = take(iterator, 2)
        replaced = np.concatenate([batch.replaced for batch in batches])
        assert replaced.sum() == iterator.counts["replaced"] == 2
        counts = found.tally.counts()
        assert set(counts) == {"corrupt-jpeg", "unknown-instruction"}
        assert "sample 3, image.jpg" in found.tally.text()
        assert "'99'" in found.tally.text()
        assert not {3, 11} & set(numbers(batches))

    def test_the_others_stay_where_they_are(self, damaged, tmp_path):
        sound = write_dataset(tmp_path / "sound", shards=2, samples=8)
        one, two = take(stream(damaged, 8), 2), take(stream(sound, 8), 2)
        for bad, good in zip(one, two, strict=True):
            kept = ~bad.replaced
            assert np.array_equal(bad.sample[kept], good.sample[kept])
            assert np.array_equal(bad.key, good.key)

    def test_a_bad_sample_counts_once_however_often_it_is_drawn(self, damaged):
        found = stream(damaged, 8)
        iterator = iter(found)
        take(iterator, 20)
        assert iterator.counts["replaced"] == 20
        assert found.tally.counts() == {"corrupt-jpeg": 1, "unknown-instruction": 1}

    def test_in_an_evaluation_substitutes_are_not_valid(self, damaged):
        batches = take(stream(damaged, 8, shuffle=False, epochs=1, last_batch="pad"), 2)
        seen = [int(number) for batch in batches for number in batch.sample[batch.valid, 1]]
        assert seen == [number for number in range(16) if number not in (3, 11)]

    def test_bad_questions_are_replaced_by_questions(self, tmp_path):
        def make(number):
            return question(number) | ({"conversation.json": b"{"} if number == 2 else {})

        write_shards(tmp_path / "questions", shards=1, samples=6, make=make)
        (tmp_path / "all.yaml").write_text(
            "name: q\ntype: mixture\nquestions: {shards_dir: questions, share: 1}\n", encoding="utf-8"
        )
        found = stream(tmp_path / "all.yaml", 6)
        (batch,) = take(found, 1)
        assert batch.replaced.sum() == 1
        assert not batch.is_action.any()
        assert found.tally.counts() == {"bad-conversation": 1}

    def test_after_an_error_the_same_step_comes_again(self, damaged):
        iterator = iter(stream(damaged, 2, shuffle=False, strict=True, threads=1))
        next(iterator)
        for _ in range(2):
            with pytest.raises(SampleError, match="sample 3"):
                next(iterator)
            assert iterator.get_state()["position"] == 2

    def test_substitutes_are_the_same_after_a_restart(self, damaged):
        iterator = iter(stream(damaged, 8))
        next(iterator)
        state = iterator.get_state()
        again = iter(stream(damaged, 8, threads=1))
        again.set_state(state)
        assert digest(next(again)) == digest(next(iterator))

    def test_strict_stops_at_the_first(self, damaged):
        with pytest.raises(SampleError, match=r"sample (3|11)"):
            take(stream(damaged, 8, strict=True, epochs=1), 2)

    def test_a_dataset_without_a_good_sample(self, tmp_path):
        file = write_dataset(tmp_path / "x", make=lambda n: sample(n) | {"image.jpg": b"rubbish"})
        with pytest.raises(DataError, match="no sample of a dataset can be read"):
            next(iter(stream(file)))

    def test_empty_datasets(self, tmp_path):
        file = write_dataset(tmp_path / "x", shards=1, samples=1)
        (tmp_path / "x/shards/shard-000000.tar").write_bytes(b"")
        with pytest.raises(DataError, match="empty-shard"):
            stream(file)
        with pytest.raises(ConfigError, match="does not fill a batch"):
            stream(write_dataset(tmp_path / "y", shards=1, samples=3), 4, epochs=1)


def test_images_are_corrupted_by_their_key(dataset):
    def corrupt(image, key):
        return image ^ np.uint8(key[0] % 256)

    (plain,), (changed,) = take(stream(dataset), 1), take(stream(dataset, corrupt=corrupt), 1)
    expected = plain.image ^ (plain.key[:, 0] % 256).astype(np.uint8)[:, None, None, None]
    assert np.array_equal(changed.image, expected)


@pytest.mark.parametrize("shape", [(10, 10, 3), (384, 768, 3), (1000, 30, 3), (37, 999, 3)])
def test_letterbox_keeps_the_aspect_ratio(shape):
    image = np.full(shape, 200, np.uint8)
    frame = letterbox(image, (384, 768, 3))
    assert frame.shape == (384, 768, 3)
    rows, columns = np.flatnonzero(frame.any(axis=(1, 2))), np.flatnonzero(frame.any(axis=(0, 2)))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert height == 384 or width == 768
    assert abs(height * shape[1] - width * shape[0]) <= max(shape) * 0.51 + 1
    assert abs((rows[0] + rows[-1]) - 383) <= 1
    assert abs((columns[0] + columns[-1]) - 767) <= 1
