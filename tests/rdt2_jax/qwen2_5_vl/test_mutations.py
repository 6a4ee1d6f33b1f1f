"""Known mistakes of such ports, made on purpose: each must break at least one row of the parity table.

A port with one of these runs, trains and is quietly worse; what is shown here is that the table would not let it by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from qwen_stages import broken, differences, port_stages

from rdt2_jax.layers import attention as attention_room
from rdt2_jax.qwen2_5_vl import grid as grids
from rdt2_jax.qwen2_5_vl import model, text, vision
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, from_published, to_published
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

pytestmark = pytest.mark.torch_peer


@dataclasses.dataclass
class Port:
    """What a mistake may change."""

    params: model.Qwen25VLParams
    config: Qwen25VLConfig
    prompts: tiny_qwen.Prompts
    patch: pytest.MonkeyPatch

    def change_text(self, **changes: Any) -> None:
        self.config = self.config.model_copy(update={"text": self.config.text.model_copy(update=changes)})

    def change_vision(self, **changes: Any) -> None:
        self.config = self.config.model_copy(update={"vision": self.config.vision.model_copy(update=changes)})

    def change_params(self, change: Callable[[str, jax.Array], jax.Array]) -> None:
        def apply(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            return change(".".join(str(getattr(key, "name", key)) for key in path), leaf)

        self.params = jax.tree_util.tree_map_with_path(apply, self.params)


MISTAKES: dict[str, Callable[[Port], None]] = {}


def mistake(function: Callable[[Port], None]) -> Callable[[Port], None]:
    MISTAKES[function.__name__.replace("_", " ")] = function
    return function


@mistake
def image_tokens_counted_like_text(port: Port) -> None:
    port.patch.setattr(grids, "token_positions", _plain_positions)


@mistake
def full_attention_blocks_shifted_by_one(port: Port) -> None:
    block = vision._block
    table = grids.windows(port.config.vision, port.prompts.grid)
    port.patch.setattr(vision, "_block", lambda *args: block(*args[:5], table if args[5] is None else None))


@mistake
def all_blocks_with_full_attention(port: Port) -> None:
    block = vision._block
    port.patch.setattr(vision, "_block", lambda *args: block(*args[:5], None))


@mistake
def no_window_order(port: Port) -> None:
    def unordered(config: Any, grid: Any) -> grids.Windows:
        table = grids.windows(config, grid)
        return dataclasses.replace(
            table,
            token_order=np.arange(len(table.token_order)),
            patch_order=np.arange(len(table.patch_order)),
            token_restore=np.arange(len(table.token_order)),
        )

    port.patch.setattr(vision, "windows", unordered)


@mistake
def padding_of_windows_not_masked(port: Port) -> None:
    def unmasked(config: Any, grid: Any) -> grids.Windows:
        table = grids.windows(config, grid)
        return dataclasses.replace(table, valid=np.concatenate([np.ones_like(table.valid[:-1]), table.valid[-1:]]))

    port.patch.setattr(vision, "windows", unmasked)


@mistake
def tokens_left_in_window_order(port: Port) -> None:
    port.patch.setattr(
        vision,
        "windows",
        lambda config, grid: dataclasses.replace(
            grids.windows(config, grid), token_restore=np.arange(len(grids.windows(config, grid).token_order))
        ),
    )


@mistake
def vision_positions_row_by_row(port: Port) -> None:
    _, height, width = port.prompts.grid
    rows, columns = np.divmod(np.arange(height * width), width)
    port.patch.setattr(vision, "patch_positions", lambda *_: np.stack([rows, columns], axis=-1))


@mistake
def vision_rows_and_columns_swapped(port: Port) -> None:
    right = vision.patch_positions
    port.patch.setattr(vision, "patch_positions", lambda *args: right(*args)[:, ::-1])


@mistake
def token_rows_and_columns_swapped(port: Port) -> None:
    right = text.rotary_of
    port.patch.setattr(text, "rotary_of", lambda config, positions: right(config, positions[np.array([0, 2, 1])]))


@mistake
def mrope_sections_in_another_order(port: Port) -> None:
    port.change_text(mrope_sections=(3, 3, 2))


@mistake
def text_after_an_image_continues_at_its_token_count(port: Port) -> None:
    right = grids.token_positions

    def counted(config: Any, ids: np.ndarray, mask: np.ndarray, images: Any) -> tuple[np.ndarray, np.ndarray]:
        positions, following = right(config, ids, mask, images)
        tokens = port.prompts.grid[1] * port.prompts.grid[2] // 4
        extra = tokens - max(port.prompts.grid[1:]) // 2
        seen = np.cumsum(ids == config.image_token_id, axis=1) == tokens
        after = (seen & (ids != config.image_token_id))[None]
        return positions + extra * after, following + extra

    port.patch.setattr(grids, "token_positions", counted)


@mistake
def padding_seen_as_keys(port: Port) -> None:
    right = text.attention
    port.patch.setattr(text, "attention", lambda *args, **options: right(*args, **{**options, "key_valid": None}))


@mistake
def no_causal_mask(port: Port) -> None:
    right = text.attention
    port.patch.setattr(text, "attention", lambda *args, **options: right(*args, **{**options, "causal": False}))


@mistake
def query_heads_dealt_round_to_key_heads(port: Port) -> None:
    """Query head i reads key head i mod kv_heads instead of i // group."""
    right = text.attention

    def dealt(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        group = query.shape[1] // key.shape[1]
        return right(query, jnp.tile(key, (1, group, 1, 1)), jnp.tile(value, (1, group, 1, 1)), **options)

    port.patch.setattr(text, "attention", dealt)


@mistake
def scores_not_scaled(port: Port) -> None:
    right = attention_room._grouped
    port.patch.setattr(attention_room, "_grouped", lambda query, *rest: right(query * query.shape[-1] ** 0.5, *rest))


@mistake
def vision_qkv_bias_dropped(port: Port) -> None:
    port.change_params(lambda name, leaf: jnp.zeros_like(leaf) if name.endswith("qkv.bias") else leaf)


@mistake
def text_qkv_bias_dropped(port: Port) -> None:
    port.change_params(
        lambda name, leaf: jnp.zeros_like(leaf) if name.startswith("text.") and name.endswith("bias") else leaf
    )


@mistake
def patch_rows_and_columns_transposed(port: Port) -> None:
    def transpose(name: str, leaf: jax.Array) -> jax.Array:
        if name != "vision.patch.weight":
            return leaf
        return leaf.reshape(-1, 3, 2, 14, 14).swapaxes(-1, -2).reshape(leaf.shape)

    port.change_params(transpose)


@mistake
def one_grey_level_off(port: Port) -> None:
    port.prompts = dataclasses.replace(port.prompts, patches=port.prompts.patches + np.float32(1 / 255 / 0.27))


@mistake
def epsilon_of_the_decoder_1e_5(port: Port) -> None:
    port.change_text(norm_eps=1e-5)


@mistake
def gelu_of_the_merger_by_tanh(port: Port) -> None:
    right = jax.nn.gelu
    port.patch.setattr(jax.nn, "gelu", lambda x, approximate: right(x, approximate=True))


@mistake
def keys_taken_before_the_rotary_embedding(port: Port) -> None:
    right = text._project

    def before(layer: Any, config: Any, x: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        still = jnp.ones_like(rotary[0]), jnp.zeros_like(rotary[1])
        return right(layer, config, x, rotary)[0], *right(layer, config, x, still)[1:]

    port.patch.setattr(text, "_project", before)


@mistake
def neighbours_as_rotary_pairs(port: Port) -> None:
    right = text.rotate

    def interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        paired = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        turned = right(paired, cos, sin)
        first, second = jnp.split(turned, 2, axis=-1)
        return jnp.stack([first, second], axis=-1).reshape(x.shape)

    port.patch.setattr(text, "rotate", interleaved)


@mistake
def gate_and_up_swapped(port: Port) -> None:
    layers = port.params.text.layers
    assert isinstance(layers, text.TextLayer)
    swapped = layers.mlp.replace(gate=layers.mlp.up, up=layers.mlp.gate)
    port.params = port.params.replace(text=port.params.text.replace(layers=layers.replace(mlp=swapped)))


@mistake
def images_scattered_from_the_wrong_end(port: Port) -> None:
    right = text.insert_images
    port.patch.setattr(text, "insert_images", lambda e, where, tokens: right(e, where, tokens[:, ::-1]))


def _plain_positions(config: Any, ids: np.ndarray, mask: np.ndarray, _: Any) -> tuple[np.ndarray, np.ndarray]:
    counted = np.where(mask > 0, np.cumsum(mask, axis=1) - 1, 0)
    return np.broadcast_to(counted, (3, *ids.shape)), mask.sum(axis=1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """Peer, parameters, configuration, and a prompt's stages."""
    peer = tiny_qwen.make_peer()
    folder = tiny_qwen.save_peer(peer, tmp_path_factory.mktemp("mutations") / "model")
    from rdt2_jax.qwen2_5_vl.config import read_config

    config = read_config(folder)
    assert from_published(to_published(config)) == config
    params, _ = load(qwen2_5_vl_table(config), model.param_specs(config), folder)
    # neither side divides by a window, rows differ in length, the image is wider than high
    prompts = tiny_qwen.make_prompts((1, 12, 18))
    return peer, params, config, (prompts, tiny_qwen.peer_stages(peer, prompts))


def test_without_a_mistake_nothing_is_broken(reference: Any) -> None:
    _, params, config, (prompts, theirs) = reference
    assert not broken(differences(port_stages(params, config, prompts), theirs, prompts.mask))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name: str, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params, config, (prompts, theirs) = reference
    port = Port(params, config, prompts, monkeypatch)
    MISTAKES[name](port)
    found = broken(differences(port_stages(port.params, port.config, port.prompts), theirs, prompts.mask))
    assert found, f"no row of the parity table notices: {name}"


def test_epsilon_of_the_vision_norms_is_caught_by_patches_of_low_variance(reference: Any) -> None:
    peer, params, config, (prompts, _) = reference
    faint = dataclasses.replace(prompts, patches=prompts.patches * np.float32(1e-3))
    theirs = tiny_qwen.peer_stages(peer, faint)
    wrong = config.model_copy(update={"vision": config.vision.model_copy(update={"norm_eps": 1e-5})})
    assert not broken(differences(port_stages(params, config, faint), theirs, faint.mask))
    assert broken(differences(port_stages(params, wrong, faint), theirs, faint.mask))
