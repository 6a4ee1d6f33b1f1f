"""The report finds what it is there to find."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from rdt2_jax.action_tokenizer.plot import plot_report
from rdt2_jax.action_tokenizer.report import arm_errors, examine, reconstruct
from rdt2_jax.actions.layout import ROT6D, arm_slice
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.rotations import matrix_to_rot6d, rot6d_to_matrix, rotvec_to_matrix
from rdt2_jax.errors import DataError


@pytest.fixture(scope="module")
def normalizer(chunks):
    return LinearNormalizer.fit_actions(chunks)


@pytest.fixture(scope="module")
def perfect(chunks, small_config, small_params, normalizer):
    """A reconstruction without any error, to put known errors into."""
    measured = reconstruct(small_params, small_config, normalizer, chunks, batch_size=24)
    zeros = np.zeros_like(measured.position_mm)
    return dataclasses.replace(measured, decoded=chunks, position_mm=zeros, rotation_deg=zeros, width_mm=zeros)


def with_errors(perfect, decoded):
    errors = [arm_errors(decoded, perfect.actions, arm) for arm in ("right", "left")]
    position, rotation, width = (np.stack(unit, axis=-1) for unit in zip(*errors, strict=True))
    return dataclasses.replace(perfect, decoded=decoded, position_mm=position, rotation_deg=rotation, width_mm=width)


def test_known_errors_come_out_in_their_units(perfect):
    decoded = perfect.actions.copy()
    decoded[..., 1] += 0.003
    decoded[..., 19] -= 0.002
    turned = rot6d_to_matrix(decoded[..., 3:9]) @ rotvec_to_matrix(np.radians([0, 0, 4.0]))
    decoded[..., 3:9] = matrix_to_rot6d(turned)
    position, rotation, width = arm_errors(decoded, perfect.actions, "right")
    np.testing.assert_allclose(position, 3.0, rtol=1e-3)
    np.testing.assert_allclose(rotation, 4.0, rtol=1e-3)
    np.testing.assert_allclose(width, 0.0, atol=1e-6)
    position, rotation, width = arm_errors(decoded, perfect.actions, "left")
    np.testing.assert_allclose(position, 0.0, atol=1e-6)
    np.testing.assert_allclose(rotation, 0.0, atol=1e-3)
    np.testing.assert_allclose(width, 2.0, rtol=1e-3)


def test_exploding_small_rotations_are_named(perfect, small_config, normalizer):
    actions, decoded = perfect.actions.copy(), perfect.actions.copy()
    left = arm_slice("left")
    still = matrix_to_rot6d(np.eye(3))
    actions[7, :, left][:, ROT6D] = still
    decoded[7, :, left][:, ROT6D] = matrix_to_rot6d(rotvec_to_matrix(np.radians([25.0, 0, 0])))
    report = examine(with_errors(dataclasses.replace(perfect, actions=actions), decoded), small_config, normalizer)
    assert [(o.chunk, o.arm) for o in report.rotation_outliers] == [(7, "left")]
    assert "chunk 7, left arm: turns 0.00 deg, decoded 25.00 deg off" in str(report.rotation_outliers[0])
    assert not report.fits


def test_large_rotations_decoded_badly_are_errors_not_outliers(perfect, small_config, normalizer):
    actions = perfect.actions.copy()
    actions[3, :, 3:9] = matrix_to_rot6d(rotvec_to_matrix(np.radians([0, 40.0, 0])))
    decoded = actions.copy()
    decoded[3, :, 3:9] = matrix_to_rot6d(rotvec_to_matrix(np.radians([0, 50.0, 0])))
    report = examine(with_errors(dataclasses.replace(perfect, actions=actions), decoded), small_config, normalizer)
    assert report.rotation_outliers == []
    assert report.errors["rotation_deg"]["right"]["p100"] == pytest.approx(10.0, abs=0.01)


def test_a_forgotten_arm_shows(perfect, small_config, normalizer):
    decoded = perfect.actions.copy()
    decoded[..., arm_slice("left")][..., ROT6D] = matrix_to_rot6d(np.eye(3))
    rotation = examine(with_errors(perfect, decoded), small_config, normalizer).errors["rotation_deg"]
    assert rotation["right"]["p50"] == pytest.approx(0.0, abs=1e-3)
    assert rotation["left"]["p50"] > 1.0


def test_statistics_out_of_bounds(perfect, small_config, normalizer):
    assert examine(perfect, small_config, normalizer).out_of_range == []
    scaled = perfect.actions.copy()
    scaled[..., 2] *= 3.0
    report = examine(dataclasses.replace(perfect, actions=scaled), small_config, normalizer)
    assert report.out_of_range == [2]
    assert next(r for r in report.ranges if r.channel == 2).outside > 0.01


def test_a_normalizer_that_is_not_the_codecs(perfect, small_config, normalizer):
    """Its own statistics leave the bounds, even where these chunks happen to stay inside."""
    field = normalizer.field("action")
    scale = field.scale.copy()
    scale[10] *= 2.0
    other = LinearNormalizer({"action": dataclasses.replace(field, scale=scale)})
    still = perfect.actions.copy()
    still[..., 10] = 0.0
    report = examine(dataclasses.replace(perfect, actions=still), small_config, other)
    assert report.out_of_range == [10]
    assert next(r for r in report.ranges if r.channel == 10).outside == 0


def test_code_use(perfect, small_config, normalizer):
    tokens = np.zeros_like(perfect.tokens)
    tokens[0, 0] = 5  # level 0 of the positions sees two codes
    report = examine(dataclasses.replace(perfect, tokens=tokens), small_config, normalizer)
    assert report.code_use["pos"] == [2 / 128, 1 / 128, 1 / 128]
    assert report.code_perplexity["grip"] == [pytest.approx(1.0)]


def test_reconstruct_pads_the_last_batch(chunks, small_config, small_params, normalizer):
    whole = reconstruct(small_params, small_config, normalizer, chunks, batch_size=64)
    parts = []
    pieces = reconstruct(small_params, small_config, normalizer, chunks, batch_size=24, progress=parts.append)
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    np.testing.assert_allclose(pieces.decoded, whole.decoded, rtol=0, atol=1e-5)
    assert sum(parts) == len(chunks)


def test_plot_and_json(perfect, small_config, normalizer, tmp_path):
    report = examine(perfect, small_config, normalizer)
    plot_report(perfect, report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert json.loads(json.dumps(report.to_json()))["num_chunks"] == len(perfect.actions)


def test_empty_and_nan_chunks(small_config, small_params, normalizer, chunks):
    with pytest.raises(DataError, match="at least one chunk"):
        reconstruct(small_params, small_config, normalizer, chunks[:0])
    broken = chunks.copy()
    broken[2, 3, 4] = np.nan
    with pytest.raises(DataError, match=r"chunks\.npy"):
        reconstruct(small_params, small_config, normalizer, broken, where="chunks.npy")
