"""A teacher and its students, trained: the one step that a teacher cannot make, either objective teaches."""

from __future__ import annotations

import dataclasses
from typing import Any

import bimodal
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert.distill import DistillConfig
from rdt2_jax.action_expert.flow import ONE_STEP, Schedule

FIVE_STEPS = Schedule(5)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A teacher with its samples from noise that nobody was trained on."""

    problem: Any
    params: Any
    noise: jax.Array
    which: jax.Array
    one: jax.Array
    five: jax.Array


@pytest.fixture(scope="module")
def teacher() -> Trained:
    problem = bimodal.make_problem()
    params = bimodal.train_teacher(problem, bimodal.TEACHER_STEPS)
    noise, which = bimodal.fresh_noise(1024, seed=99)
    one, five = (bimodal.sample(problem, params, noise, which, s) for s in (ONE_STEP, FIVE_STEPS))
    return Trained(problem, params, noise, which, one, five)


def test_one_step_of_the_teacher_is_ten_times_as_wrong_as_five(teacher: Trained) -> None:
    one, five = (teacher.problem.errors(chunks, teacher.which).mean() for chunks in (teacher.one, teacher.five))
    assert one >= 10 * five
    assert 0.3 < jnp.mean(teacher.problem.sides(teacher.five, teacher.which) > 0) < 0.7  # both answers are given


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(objective="regression"),
        DistillConfig(objective="consistency", distance="pseudo_huber", huber_scale=bimodal.HUBER_SCALE),
    ],
    ids=lambda config: config.objective,
)
def test_students_make_five_steps_at_once(config: DistillConfig, teacher: Trained) -> None:
    before = jax.tree.map(np.array, teacher.params)
    student = bimodal.train_student(teacher.problem, teacher.params, config, bimodal.STUDENT_STEPS[config.objective])
    jax.tree.map(np.testing.assert_array_equal, before, teacher.params)

    chunks = bimodal.sample(teacher.problem, student, teacher.noise, teacher.which, ONE_STEP)
    teachers, students = (bimodal.distance(found, teacher.five) for found in (teacher.one, chunks))
    assert students.mean() <= teachers.mean() / 5
    assert (
        teacher.problem.errors(chunks, teacher.which).mean()
        < teacher.problem.errors(teacher.one, teacher.which).mean() / 3
    )
