"""Every op is a bijection whose shapes can be told in advance, and means what the torch layer means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt2_jax.errors import CheckpointError
from rdt2_jax.weights import ops
from rdt2_jax.weights.ops import Inverse, Permute, Split, chain, merge, reshape

# name -> (op, source shape, target shape)
OPS = {
    "identity": (ops.identity, (5, 3), (5, 3)),
    "identity of a scalar": (ops.identity, (), ()),
    "transpose": (ops.transpose, (5, 3), (3, 5)),
    "conv1d": (ops.conv1d, (6, 4, 3), (3, 4, 6)),
    "conv_transpose1d": (ops.conv_transpose1d, (4, 6, 3), (3, 4, 6)),
    "permute": (Permute((1, 3, 0, 2)), (2, 3, 4, 5), (3, 5, 2, 4)),
    "split": (Split(1, (3, 4)), (2, 12, 5), (2, 3, 4, 5)),
    "merge": (merge(1, (3, 4)), (2, 3, 4, 5), (2, 12, 5)),
    "reshape": (reshape((4, 6), (3, 2, 4)), (4, 6), (3, 2, 4)),
    "inverse": (Inverse(ops.conv_transpose1d), (3, 4, 6), (4, 6, 3)),
    "chain": (chain(Split(0, (2, 3)), Permute((1, 0, 2)), merge(0, (3, 2))), (6, 5), (6, 5)),
    "empty chain": (chain(), (2, 3), (2, 3)),
    "convolution_as_linear": (ops.convolution_as_linear((3, 2, 4, 4)), (7, 3, 2, 4, 4), (96, 7)),
    "heads_out": (ops.heads_out(3, 4), (12, 5), (5, 3, 4)),
    "heads_bias": (ops.heads_bias(3, 4), (12,), (3, 4)),
    "heads_in": (ops.heads_in(3, 4), (5, 12), (3, 4, 5)),
    "fused_heads_out": (ops.fused_heads_out(3, 2, 4), (24, 5), (3, 5, 2, 4)),
    "interleaved_heads_out": (ops.interleaved_heads_out(2, 3, 4), (24, 5), (2, 5, 3, 4)),
}


def numbered(shape: tuple[int, ...], dtype: str = "int32") -> np.ndarray:
    """Every element tells where it came from."""
    return np.arange(math.prod(shape), dtype=dtype).reshape(shape)


class TestBijection:
    @pytest.mark.parametrize("name", OPS)
    def test_shapes_are_predicted(self, name):
        op, source, target = OPS[name]
        assert op.target_shape(source) == target
        assert op.source_shape(target) == source
        assert op.apply(numbered(source)).shape == target
        assert op.invert(numbered(target)).shape == source

    @pytest.mark.parametrize("name", OPS)
    def test_round_trips_are_exact(self, name):
        op, source, target = OPS[name]
        np.testing.assert_array_equal(op.invert(op.apply(numbered(source))), numbered(source))
        np.testing.assert_array_equal(op.apply(op.invert(numbered(target))), numbered(target))

    @pytest.mark.parametrize("name", OPS)
    def test_the_dtype_stays(self, name):
        op, source, _ = OPS[name]
        assert op.apply(numbered(source, "float16")).dtype == np.float16
        assert op.invert(op.apply(numbered(source, "float16"))).dtype == np.float16

    @given(order=st.permutations(range(4)), shape=st.tuples(*[st.integers(1, 4)] * 4))
    def test_any_permutation(self, order, shape):
        op = Permute(tuple(order))
        array = numbered(shape)
        assert op.target_shape(shape) == op.apply(array).shape
        assert op.source_shape(op.apply(array).shape) == shape
        np.testing.assert_array_equal(op.invert(op.apply(array)), array)

    def test_a_permutation_names_the_source_dimension_of_every_target_dimension(self):
        array = numbered((2, 3, 4))
        assert Permute((2, 0, 1)).apply(array)[3, 1, 2] == array[1, 2, 3]

    def test_the_first_part_of_a_split_varies_slowest(self):
        assert Split(0, (2, 3)).apply(np.arange(6)).tolist() == [[0, 1, 2], [3, 4, 5]]


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("name", ["transpose", "conv1d", "conv_transpose1d", "permute"])
    def test_wrong_rank(self, name):
        op, source, target = OPS[name]
        with pytest.raises(CheckpointError, match=f"expected: {len(source)} dimensions"):
            op.target_shape((*source, 1))
        with pytest.raises(CheckpointError, match="wrong number of dimensions"):
            op.source_shape(target[1:])

    def test_not_a_permutation(self):
        with pytest.raises(CheckpointError, match="not a permutation"):
            Permute((0, 2))

    @pytest.mark.parametrize("shape", [(13, 5), (), (5, 12)])
    def test_heads_that_do_not_divide(self, shape):
        with pytest.raises(CheckpointError, match="expected: 12 in dimension 0"):
            ops.heads_out(3, 4).target_shape(shape)

    @pytest.mark.parametrize("shape", [(4, 3), (12,), (3,), ()])
    def test_heads_of_another_size(self, shape):
        with pytest.raises(CheckpointError, match=r"expected: \(3, 4\) in dimensions 0..1"):
            ops.heads_bias(3, 4).source_shape(shape)

    def test_reshape_to_another_number_of_elements(self):
        with pytest.raises(CheckpointError, match="number of elements"):
            reshape((4, 6), (5, 5))

    def test_reshape_from_another_shape(self):
        with pytest.raises(CheckpointError, match="cannot be merged"):
            reshape((4, 6), (24,)).target_shape((6, 4))


@pytest.mark.torch_peer
class TestTorchSemantics:
    """A torch layer and an einsum with the converted kernel agree."""

    @staticmethod
    def run(layer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(output of the layer without its bias, its weight)."""
        import torch

        layer = layer.double()
        with torch.no_grad():
            return layer(torch.from_numpy(x)).numpy(), layer.weight.detach().numpy()

    @staticmethod
    def values(*shape: int) -> np.ndarray:
        return np.random.default_rng(0).normal(size=shape)

    def test_linear(self):
        from torch import nn

        x = self.values(4, 5)
        expected, weight = self.run(nn.Linear(5, 3, bias=False), x)
        np.testing.assert_allclose(x @ ops.transpose.apply(weight), expected, atol=1e-12)

    def test_conv1d(self):
        from torch import nn

        x = self.values(2, 5, 9)
        expected, weight = self.run(nn.Conv1d(5, 3, 4, stride=2, bias=False), x)
        windows = np.lib.stride_tricks.sliding_window_view(x, 4, axis=2)[:, :, ::2]  # (batch, in, time, tap)
        found = np.einsum("bitk,kio->bot", windows, ops.conv1d.apply(weight))
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_conv_transpose1d(self):
        from torch import nn

        x = self.values(2, 5, 6)
        expected, weight = self.run(nn.ConvTranspose1d(5, 3, 4, stride=2, bias=False), x)
        found = np.zeros_like(expected)
        for tap, kernel in enumerate(ops.conv_transpose1d.apply(weight)):
            found[:, :, tap : tap + 2 * 6 : 2] += np.einsum("bit,io->bot", x, kernel)
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_patch_embedding(self):
        from torch import nn

        x = self.values(6, 3, 2, 4, 4)  # six patches
        expected, weight = self.run(nn.Conv3d(3, 7, (2, 4, 4), stride=(2, 4, 4), bias=False), x)
        found = x.reshape(6, -1) @ ops.convolution_as_linear((3, 2, 4, 4)).apply(weight)
        np.testing.assert_allclose(found, expected.reshape(6, 7), atol=1e-12)

    def test_query_projection(self):
        from torch import nn

        x = self.values(6, 5)
        expected, weight = self.run(nn.Linear(5, 12, bias=False), x)
        found = np.einsum("te,ehd->thd", x, ops.heads_out(3, 4).apply(weight))
        np.testing.assert_allclose(found, expected.reshape(6, 3, 4), atol=1e-12)

    def test_query_bias(self):
        import torch
        from torch import nn

        layer = nn.Linear(5, 12).double()
        with torch.no_grad():
            expected = layer(torch.zeros(5, dtype=torch.float64)).numpy().reshape(3, 4)
        np.testing.assert_array_equal(ops.heads_bias(3, 4).apply(layer.bias.detach().numpy()), expected)

    def test_output_projection(self):
        from torch import nn

        x = self.values(6, 3, 4)
        expected, weight = self.run(nn.Linear(12, 5, bias=False), x.reshape(6, 12))
        found = np.einsum("thd,hde->te", x, ops.heads_in(3, 4).apply(weight))
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_fused_query_key_value(self):
        from torch import nn

        x = self.values(6, 5)
        expected, weight = self.run(nn.Linear(5, 3 * 2 * 4, bias=False), x)
        found = np.einsum("te,pehd->tphd", x, ops.fused_heads_out(3, 2, 4).apply(weight))
        np.testing.assert_allclose(found, expected.reshape(6, 3, 2, 4), atol=1e-12)

    def test_interleaved_key_value(self):
        from torch import nn

        x = self.values(6, 5)
        expected, weight = self.run(nn.Linear(5, 3 * 4 * 2, bias=False), x)
        found = np.einsum("te,pehd->thdp", x, ops.interleaved_heads_out(2, 3, 4).apply(weight))
        np.testing.assert_allclose(found, expected.reshape(6, 3, 4, 2), atol=1e-12)
