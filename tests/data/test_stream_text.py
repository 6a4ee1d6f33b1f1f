"""Instructions and conversations as rows of one length."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from qwen_vocabulary import qwen_tokenizer_folder
from rdt2_data.dataset_config import load_dataset
from rdt2_data.pipeline.stream import StreamConfig, TrainingStream
from rdt2_data.pipeline.text import ACTION_COLUMNS, TextEncoder
from rdt2_data.samples import Turn
from small_shards import write_dataset

from rdt2_jax.action_tokenizer.vocabulary import tokens_to_ids
from rdt2_jax.errors import ConfigError
from rdt2_jax.qwen2_5_vl.prompt import action_example, action_prompt
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

IMAGE_TOKENS = 6
LENGTH = 80
TOKENS = np.arange(27, dtype=np.int32)[None]
YES = np.ones(1, bool)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(qwen_tokenizer_folder())


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TextEncoder(tokenizer, IMAGE_TOKENS, LENGTH)


def one(encoder, text, tokens=TOKENS, has_tokens=YES):
    rows = encoder.encode([text], tokens, has_tokens)
    return rows.input_ids[0], rows.mask[0], rows.supervised[0], bool(rows.truncated[0])


def words(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids])


def test_an_action_row_is_the_published_prompt(encoder, tokenizer):
    ids, mask, supervised, truncated = one(encoder, "Pick up the apple.")
    expected = action_example(tokenizer, "Pick up the apple.", IMAGE_TOKENS, tokens_to_ids(TOKENS[0]).tolist())
    assert ids[mask].tolist() == expected.ids
    assert supervised[mask].tolist() == expected.supervised
    assert not supervised[~mask].any()
    assert not truncated
    assert ids.shape == (LENGTH,)


def test_action_ids_stand_in_fixed_columns(encoder):
    for text in ("Go.", "Pick up the small red apple on the left side."):
        ids, _, supervised, _ = one(encoder, text)
        assert np.array_equal(ids[ACTION_COLUMNS], tokens_to_ids(TOKENS[0]))
        assert supervised[ACTION_COLUMNS].all()


def test_unmeasured_grippers_are_not_learnt(encoder, tokenizer):
    tokens = TOKENS.copy()
    tokens[0, 24:] = -1
    ids, _, supervised, _ = one(encoder, "Go.", tokens)
    assert (ids[ACTION_COLUMNS][24:] == tokenizer.control.endoftext).all()
    assert supervised[ACTION_COLUMNS].tolist() == [True] * 24 + [False] * 3


def test_samples_without_tokens_leave_room_for_them(encoder):
    ids, _, supervised, _ = one(encoder, "Go.", np.full((1, 27), -1, np.int32), ~YES)
    assert np.array_equal(ids[ACTION_COLUMNS], tokens_to_ids(np.zeros(27, np.int32)))
    assert supervised[ACTION_COLUMNS].all()


def test_long_instructions_lose_words(encoder, tokenizer):
    text = "Pick up the " + "very " * 60 + "small apple."
    ids, mask, supervised, truncated = one(encoder, text)
    assert truncated
    assert mask.sum() in (LENGTH - 1, LENGTH)
    assert np.array_equal(ids[ACTION_COLUMNS], tokens_to_ids(TOKENS[0]))
    assert supervised[ACTION_COLUMNS].all()
    assert "Pick up the very very" in words(tokenizer, ids)
    _, mask, _, truncated = one(encoder, "a" * 2000)
    assert truncated
    assert mask.sum() <= LENGTH


def test_conversations_follow_the_chat_template(encoder, tokenizer):
    """Against the published template, rendered by the peer's tokenizer."""
    turns = (Turn("What is it?", "A cup."), Turn("Where?", "On the left."))
    ids, mask, supervised, truncated = one(encoder, turns)
    text = words(tokenizer, ids[mask])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * IMAGE_TOKENS
        + "<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nOn the left.<|im_end|>"
    )
    learnt = words(tokenizer, ids[supervised])
    assert learnt == "<|im_start|>assistant\nA cup.<|im_end|><|im_start|>assistant\nOn the left.<|im_end|>"
    assert not truncated


def test_long_conversations_lose_their_last_turns(encoder, tokenizer):
    turns = (Turn("What is it?", "A cup."), *[Turn("And now?", "Still a cup.")] * 10)
    ids, mask, supervised, truncated = one(encoder, turns)
    assert truncated
    assert mask.sum() <= LENGTH
    assert words(tokenizer, ids[mask]).endswith("Still a cup.<|im_end|>")
    assert words(tokenizer, ids[supervised]).startswith("<|im_start|>assistant\nA cup.<|im_end|>")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("w" * 3000, "A cup."),
        ("What?", "A " + "big " * 200 + "cup."),
        ("What " + "ever " * 200 + "?", "A cup."),
        ("so " * 200, "big " * 200),
    ],
)
def test_long_turns_keep_part_of_the_answer(encoder, tokenizer, question, answer):
    ids, mask, supervised, truncated = one(encoder, (Turn(question, answer),))
    assert truncated
    assert mask.sum() <= LENGTH
    learnt = words(tokenizer, ids[supervised]).removeprefix("<|im_start|>assistant\n")
    assert learnt
    assert answer.startswith(learnt.removesuffix("<|im_end|>").rstrip())


def test_prompts_alone(tokenizer):
    """What the action expert is trained behind: as a policy asks for an action."""
    encoder = TextEncoder(tokenizer, IMAGE_TOKENS, LENGTH, with_answers=False)
    ids, mask, supervised, _ = one(encoder, "Pick up the apple.")
    assert ids[mask].tolist() == action_prompt(tokenizer, "Pick up the apple.", IMAGE_TOKENS)
    assert not supervised.any()
    with pytest.raises(ConfigError, match="answered"):
        one(encoder, (Turn("What?", "That."),))


def test_too_short_a_length(tokenizer):
    with pytest.raises(ConfigError, match="length"):
        TextEncoder(tokenizer, 378, 400)
    TextEncoder(tokenizer, 378, 440)


def test_in_a_stream_truncations_are_counted(tmp_path, tokenizer):
    file = write_dataset(tmp_path / "x")
    (tmp_path / "x/instructions.json").write_text('{"0": "Go.", "1": "Stop.", "2": "%s"}' % ("Wait a bit. " * 90))
    encoder = TextEncoder(tokenizer, IMAGE_TOKENS, LENGTH)
    iterator = iter(TrainingStream(load_dataset(file), StreamConfig(batch_size=10), encoder=encoder))
    batch = next(iterator)
    assert batch.text is not None
    assert batch.text.input_ids.shape == (10, LENGTH)
    assert batch.text.truncated.sum() == iterator.counts["truncated"] == 3
    assert pickle.loads(pickle.dumps(encoder)).length == LENGTH
