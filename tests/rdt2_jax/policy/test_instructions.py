"""Advice on instructions: what is corrected, what is only named, and that the corrected form needs no more advice."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdt2_jax.errors import DataError
from rdt2_jax.policy.instructions import instruction_advice, suggested_instruction

GOOD = (
    "Pick up the apple.",
    "Pick up the red and blue cup.",
    "Place the cup on the plate with the fork and the spoon.",
    "Bring the string.",
    "Press the 3 key.",
    "Pick up the USB cable.",
    "Pick up the 1.5 l bottle.",
    "Pick up the children's toy.",
    "Öffne die Tür.",
)


@pytest.mark.parametrize("text", GOOD)
def test_nothing_to_say_about_the_form_of_the_training_data(text):
    advice = instruction_advice(text)
    assert advice.fine
    assert (advice.corrected, advice.tasks) == (None, ())
    assert list(advice.lines()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pick up the apple.", "capital letter"),
        ("Pick up the apple", "full stop"),
        ("Pick up the apple!", "full stop"),
        ("Pick up the apple!!", "full stop"),
        ("Pick up the apple...", "stray marks"),
        ("Pick up the apple ;", "full stop"),
        (" Pick up the apple. ", "blanks"),
        ("Pick  up\nthe\tapple.", "blanks"),
        ('"Pick up the apple."', "quotes"),
        ("“pick up the apple”", "quotes"),
        ("'Pick up the apple'.", "quotes"),
        ("PICK UP THE APPLE.", "capital letters"),
        ("Please pick up the apple.", "courtesies"),
        ("Pick up the apple, please.", "courtesies"),
        ("could you please pick up the apple?", "courtesies"),
        ("I want you to pick up the apple", "courtesies"),
        ("Then pick up the apple.", "second of two tasks"),
    ],
)
def test_corrected(text, reason):
    advice = instruction_advice(text)
    assert advice.corrected == suggested_instruction(text) == "Pick up the apple."
    assert any(reason in line for line in advice.reasons), advice.reasons
    assert list(advice.lines())[-1] == 'write: "Pick up the apple."'


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("Pick up the apple and then place it in the bowl.", ("Pick up the apple.", "Place it in the bowl.")),
        ("pick up the apple and place it in the bowl", ("Pick up the apple.", "Place it in the bowl.")),
        ("Pick up the apple. Put it down!", ("Pick up the apple.", "Put it down.")),
        ("Hand me the cup, then wipe the table.", ("Hand me the cup.", "Wipe the table.")),
        ("Open it; take the cup, and close it.", ("Open it.", "Take the cup.", "Close it.")),
    ],
)
def test_several_tasks_are_separated(text, tasks):
    advice = instruction_advice(text)
    assert advice.tasks == tasks
    assert advice.corrected is None
    assert any(f"{len(tasks)} tasks" in reason for reason in advice.reasons)
    assert tasks[-1] in list(advice.lines())[-1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Where is the apple?", "a question"),
        ("Pick up the apple?", "a question"),
        ("Apple.", "a single word"),
        ("pick", "a single word"),
        ("Pick up.", "names no object"),
        ("Pick it up.", "names no object"),
        ("The apple on the table.", "not with a verb"),
        ("Picking up the apple.", "“Picking”"),
        ("拿起苹果。", "Latin letters"),
        ("", "no words"),
        (" ... ", "no words"),
        ("3!", "no words"),
    ],
)
def test_only_named(text, reason):
    advice = instruction_advice(text)
    assert not advice.fine
    assert (advice.corrected, advice.tasks) == (None, ())
    assert any(reason in line for line in advice.reasons), advice.reasons


PIECES = ("pick", "Pick", "up", "the", "apple", "USB", "please", "and", "then", "could you", "place", "it", "s'", "3")
MARKS = (" ", "  ", ".", "!", "?", ",", ";", "'", '"', "“", "”", "…", "\n", "。")


@given(st.lists(st.sampled_from((*PIECES, *MARKS, " ", " ", " ")), max_size=14).map("".join))
@example("please please pick up the apple")
@example("\"'pick up the apple'\"")
@example("Pick up the apple. ;")
@example("then then pick up the apple")
def test_the_corrected_form_needs_no_more_advice(text):
    advice = instruction_advice(text)
    assert advice.corrected != text
    assert advice.fine == (not advice.reasons)
    if advice.corrected is not None:
        assert advice.reasons
        assert instruction_advice(advice.corrected).fine
    assert len(advice.tasks) != 1


@given(st.text(max_size=30))
def test_any_text_can_be_judged(text):
    advice = instruction_advice(text)
    assert advice.corrected is None or instruction_advice(advice.corrected).fine


def test_not_a_text():
    with pytest.raises(DataError, match=r"must be a text(?s:.*)bytes"):
        instruction_advice(b"Pick up the apple.")  # pyright: ignore[reportArgumentType]
