"""Token <-> id mapping and reading generations, against tests/golden/utils; defects are pinned as corrected."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_tokenizer.tokenizer import decode
from rdt2_jax.action_tokenizer.vocabulary import PAD_ID, ids_to_tokens, parse_generation, tokens_to_ids
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden"

BATCHES = ("all_valid", "all_invalid", "invalid_first", "invalid_after_valid", "odd", "single_valid", "single_invalid")


@pytest.fixture(scope="module")
def utils(golden):
    return golden("utils", "io.npz")


def test_tokens_to_ids(utils):
    tokens, ids = utils["map/action_token"], utils["map/input_id"]
    np.testing.assert_array_equal(tokens_to_ids(tokens), ids)
    np.testing.assert_array_equal(tokens_to_ids(jnp.asarray(tokens)), ids)
    assert tokens_to_ids(np.array([-1]))[0] == PAD_ID


def test_ids_to_tokens_clamps_and_says_so(utils):
    tokens, foreign = ids_to_tokens(utils["map/any_id"], 1024)
    np.testing.assert_array_equal(tokens, utils["map/any_id_to_token_1024"])
    action_ids = (utils["map/any_id"] <= 151642) & (utils["map/any_id"] >= 150619)
    np.testing.assert_array_equal(foreign, ~action_ids)


def test_round_trip():
    tokens = np.arange(1024)
    back, foreign = ids_to_tokens(tokens_to_ids(tokens), 1024)
    np.testing.assert_array_equal(back, tokens)
    assert not foreign.any()


@pytest.mark.parametrize("batch", BATCHES)
def test_each_generation_is_judged_on_its_own(utils, tiny, batch):
    parsed = parse_generation(utils[f"{batch}/generated"], tiny.config.num_tokens, tiny.config.num_codes)
    truly_valid = utils[f"{batch}/truly_valid"]
    np.testing.assert_array_equal(parsed.well_formed, truly_valid)
    np.testing.assert_array_equal(parsed.tokens[truly_valid], utils[f"{batch}/action_tokens"][truly_valid])


@pytest.mark.parametrize("batch", BATCHES)
def test_decoded_predictions(utils, tiny, batch):
    normalizer = LinearNormalizer.load(GOLDEN / "normalizer" / "normalizer_per_dim.pt")
    parsed = parse_generation(utils[f"{batch}/generated"], tiny.config.num_tokens, tiny.config.num_codes)
    predicted = normalizer.unnormalize(np.asarray(decode(tiny.params, tiny.config, parsed.tokens)))
    rows = parsed.well_formed
    np.testing.assert_allclose(predicted[rows], utils[f"{batch}/action_pred"][rows], rtol=1e-5, atol=1e-5)


def test_invalid_after_valid_reuses_nothing(utils, tiny):
    """The public code lets an invalid generation repeat its predecessor's ids and counts it as valid."""
    name = "invalid_after_valid"
    parsed = parse_generation(utils[f"{name}/generated"], tiny.config.num_tokens, tiny.config.num_codes)
    assert utils[f"{name}/valid_mask_as_metrics_sees_it"].all()
    assert parsed.valid.sum() < len(parsed.valid)


def test_foreign_ids_are_counted():
    generated = np.full((2, 28), 151642)
    generated[:, 27] = 151651
    generated[1, 3] = 7
    parsed = parse_generation(generated, 27, 1024)
    assert parsed.well_formed.all()
    np.testing.assert_array_equal(parsed.foreign_ids, [0, 1])
    np.testing.assert_array_equal(parsed.valid, [True, False])


def test_short_generations_are_not_valid():
    assert not parse_generation(np.full((1, 5), 151642), 27, 1024).well_formed.any()


def test_wrong_type():
    with pytest.raises(DataError, match="integers"):
        parse_generation(np.zeros((2, 28)), 27, 1024)
