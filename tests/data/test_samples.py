"""Samples: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdt2_data import samples
from rdt2_data.problems import REASONS, SampleError, Tally
from small_shards import chunks, jpeg, question, sample

from rdt2_jax.actions.validation import check_actions
from rdt2_jax.errors import DataError


def raw(members, key="7"):
    return samples.RawSample(key, "shard-000003.tar", members)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_action_sample_comes_back():
    state = np.arange(20, dtype=np.float32)
    token = np.arange(27, dtype=np.int16)
    found = raw(sample(3, state=state, action_token=token, meta={"episode": "a"}))
    assert np.array_equal(samples.read_action(found), chunks(64)[3])
    assert np.array_equal(samples.read_action_token(found), token)
    assert np.array_equal(samples.read_state(found), state)
    assert samples.read_meta(found) == {"sub_task_instruction_key": "0", "episode": "a"}
    assert samples.decode_image(found).shape == (384, 768, 3)
    assert not found.is_question


def test_decoded_as_pillow_decodes():
    from PIL import Image

    out = np.empty(samples.COMPOSITE_SHAPE, np.uint8)
    samples.decode_image(raw(sample(2)), out)
    with Image.open(io.BytesIO(jpeg(2))) as image:
        assert np.array_equal(out, np.asarray(image))


def test_a_composite_has_its_size_with_and_without_a_place_to_decode_into():
    found = raw(sample(2))
    out = np.empty(samples.COMPOSITE_SHAPE, np.uint8)
    assert np.shares_memory(samples.decode_composite(found, out), out)
    assert np.array_equal(samples.decode_composite(found), out)
    other = raw(sample(2) | {"image.jpg": jpeg(0, (24, 24, 3))})
    for place in (None, out):
        with pytest.raises(SampleError) as caught:
            samples.decode_composite(other, place)
        assert caught.value.reason == "wrong-image"
        assert (caught.value.expected, caught.value.found) == (samples.COMPOSITE_SHAPE, (24, 24, 3))
    assert samples.decode_image(other).shape == (24, 24, 3)


def test_optional_members_may_be_absent():
    found = raw(sample(0, tokens=False))
    assert samples.read_action_token(found) is None
    assert samples.read_state(found) is None


def test_question_sample_comes_back():
    found = raw(question(4))
    assert found.is_question
    assert samples.read_conversation(found)[0] == samples.Turn("What is number 4?", "It is 4.")


@pytest.mark.parametrize(
    ("extension", "data", "reason"),
    [
        ("action.npy", None, "missing-member"),
        ("image.jpg", None, "missing-member"),
        ("meta.json", None, "missing-member"),
        ("action.npy", b"nonsense", "corrupt-npy"),
        ("action.npy", npy(np.zeros((24, 20), np.float32))[:-8], "corrupt-npy"),
        ("action.npy", npy(np.zeros((24, 20))), "wrong-dtype"),
        ("action.npy", npy(np.zeros((23, 20), np.float32)), "wrong-shape"),
        ("action.npy", npy(np.full((24, 20), np.nan, np.float32)), "not-finite"),
        ("action.npy", npy(np.zeros((24, 20), np.float32)), "bad-rotation"),
        ("action_token.npy", npy(np.zeros(27, np.int64)), "wrong-dtype"),
        ("action_token.npy", npy(np.full(27, 1024, np.int16)), "bad-token"),
        ("state.npy", npy(np.full(20, np.inf, np.float32)), "not-finite"),
        ("meta.json", b"{", "bad-meta"),
        ("meta.json", b"[]", "bad-meta"),
        ("meta.json", b'{"sub_task_instruction_key": true}', "bad-meta"),
        ("meta.json", b'{"sub_task_instruction_key": [1]}', "bad-meta"),
        ("image.jpg", b"nonsense", "corrupt-jpeg"),
        ("image.jpg", jpeg(0)[: len(jpeg(0)) // 2], "corrupt-jpeg"),
        ("image.jpg", jpeg(0, (24, 24, 3)), "wrong-image"),
    ],
)
def test_bad_members_are_named(extension, data, reason):
    members = sample(1, state=np.zeros(20, np.float32))
    members = {k: v for k, v in members.items() if k != extension} | ({} if data is None else {extension: data})

    def read():
        found = raw(members)
        samples.read_action(found), samples.read_action_token(found), samples.read_state(found)
        samples.read_meta(found)
        samples.decode_image(found, np.empty(samples.COMPOSITE_SHAPE, np.uint8))

    with pytest.raises(SampleError) as caught:
        read()
    assert caught.value.reason == reason
    assert "shard-000003.tar, sample 7" in str(caught.value)


def test_object_arrays_are_not_unpickled():
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(SampleError, match="cannot be read"):
        samples.read_action(raw(sample(0) | {"action.npy": stream.getvalue()}))


@pytest.mark.parametrize("text", [b"{", b"{}", b'{"turns": []}', b'{"turns": [{"question": 3, "answer": "a"}]}'])
def test_bad_conversations_are_named(text):
    with pytest.raises(SampleError) as caught:
        samples.read_conversation(raw(question(0) | {"conversation.json": text}))
    assert caught.value.reason == "bad-conversation"


def test_writing_refuses_other_types():
    with pytest.raises(DataError, match=r"action\.npy"):
        sample(0, action=np.zeros((24, 20)))
    with pytest.raises(DataError, match=r"action_token\.npy"):
        sample(0, action_token=np.zeros(27, np.int32))
    with pytest.raises(DataError, match="questions and answers"):
        samples.question_members(image_jpeg=jpeg(), turns=[])


@given(st.integers(0, 2**32 - 1), st.sampled_from(["fine", "short", "parallel"]))
def test_rotation_rule_is_that_of_the_action_space(seed, kind):
    """The quick check here and `check_actions` agree."""
    action = chunks(64)[seed % 64].copy()
    row = seed % 24
    if kind == "short":
        action[row, 3:6] *= 10.0 ** -np.random.default_rng(seed).uniform(2, 4)
    elif kind == "parallel":
        action[row, 16:19] = action[row, 13:16] + 10.0 ** -np.random.default_rng(seed).uniform(2, 4)
    found = raw(sample(0, action=action))
    try:
        check_actions(action)
    except DataError:
        with pytest.raises(SampleError):
            samples.read_action(found)
    else:
        samples.read_action(found)


def test_rotation_errors_are_those_of_each_frame_and_arm():
    action = chunks(64)[5].copy()
    assert samples.rotation_errors(action).shape == (24, 2)
    assert samples.rotation_errors(action).max() < 1e-5
    action[7, 3:6] *= 1.5  # right arm, first column
    action[9, 16:19] += 0.25 * action[9, 13:16]  # left arm, leaning
    errors = samples.rotation_errors(action)
    assert errors[7, 0] == pytest.approx(0.5, abs=1e-5)
    assert errors[9, 1] == pytest.approx(0.25, abs=1e-5)
    assert (errors > 1e-4).sum() == 2


def test_a_bad_rotation_is_told_by_the_rule_of_the_action_space():
    action = chunks(64)[0].copy()
    action[3, 13:16] = 0
    with pytest.raises(SampleError) as caught:
        samples.read_action(raw(sample(0, action=action)))
    assert "rotation of the left arm" in str(caught.value)
    assert "index [3]" in str(caught.value)


def test_tally_counts_and_keeps_the_first():
    tally = Tally()
    for i in range(20):
        tally.add(SampleError("corrupt-jpeg", where=f"sample {i}", found="rubbish"))
    tally.add(SampleError("missing-member", where="sample x"))
    assert tally.total == 21
    assert tally.counts() == {"corrupt-jpeg": 20, "missing-member": 1}
    assert tally.report()["reasons"]["corrupt-jpeg"]["examples"][0].startswith("sample 0: ")
    assert json.dumps(tally.report())
    assert "20 x corrupt-jpeg" in tally.text()
    with pytest.raises(SampleError, match="sample y"):
        Tally(strict=True).add(SampleError("missing-member", where="sample y"))


def test_tally_is_safe_from_many_threads():
    tally = Tally()
    reasons = list(REASONS)

    def add(number):
        tally.add(SampleError(reasons[number % len(reasons)], where=number))
        return tally.report()["total"], tally.text()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(800)))
    assert tally.total == 800


def test_problems_survive_pickling():
    for reason in REASONS:
        problem = SampleError(reason, where="a", expected=1, found=2, fix="c")
        again = pickle.loads(pickle.dumps(problem))
        assert (again.reason, str(again), again.line()) == (reason, str(problem), problem.line())
