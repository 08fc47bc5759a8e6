"""The algebra against einsum, and the properties that its docstrings promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora import tucker

sizes = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda p: (max(p), min(p))), min_size=1, max_size=5
)


def draw(shape_and_ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    core = normal(*(rank for _, rank in shape_and_ranks))
    return core, [normal(size, rank) for size, rank in shape_and_ranks]


@given(sizes)
@settings(deadline=None)
def test_reconstruct_is_the_einsum(shape_and_ranks):
    core, factors = draw(shape_and_ranks)
    small, large = "abcde"[: core.ndim], "vwxyz"[: core.ndim]
    equation = ",".join([small, *(i + j for i, j in zip(large, small, strict=True))]) + "->" + large
    torch.testing.assert_close(tucker.reconstruct(core, factors), torch.einsum(equation, core, *factors))


@given(sizes)
@settings(deadline=None)
def test_hosvd_of_a_tucker_tensor_is_exact_at_its_ranks(shape_and_ranks):
    tensor = tucker.reconstruct(*draw(shape_and_ranks))
    ranks = [rank for _, rank in shape_and_ranks]
    core, factors = tucker.hosvd(tensor, ranks)
    assert core.shape == tuple(ranks)
    for factor in factors:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1], dtype=factor.dtype))
    torch.testing.assert_close(tucker.reconstruct(core, factors), tensor, rtol=1e-9, atol=1e-9)


@given(sizes, st.integers(1, 3))
@settings(deadline=None)
def test_hooi_is_never_worse_than_hosvd(shape_and_ranks, cut):
    tensor = draw([(size, size) for size, _ in shape_and_ranks])[0]
    ranks = [max(1, rank // cut) for _, rank in shape_and_ranks]
    errors = [(tensor - tucker.reconstruct(*method(tensor, ranks))).norm() for method in (tucker.hosvd, tucker.hooi)]
    assert errors[1] <= errors[0] + 1e-9


@given(sizes, st.lists(st.floats(-3, 3), min_size=1, max_size=4))
@settings(deadline=None)
def test_block_sum_is_exact_and_no_larger_than_the_weight(shape_and_ranks, weights):
    spaces = [draw(shape_and_ranks, seed) for seed in range(len(weights))]
    core, factors = tucker.block_sum(spaces, weights)
    expected = sum(w * tucker.reconstruct(*space) for w, space in zip(weights, spaces, strict=True))
    torch.testing.assert_close(tucker.reconstruct(core, factors), expected, rtol=1e-9, atol=1e-9)
    assert all(r <= size for r, (size, _) in zip(core.shape, shape_and_ranks, strict=True))


@pytest.mark.parametrize("mode", range(3))
def test_mode_product_multiplies_the_unfolding(mode):
    core, _ = draw([(4, 4), (3, 3), (5, 5)])
    matrix = torch.randn(7, core.shape[mode], dtype=torch.float64)
    result = tucker.mode_product(core, matrix, mode)
    torch.testing.assert_close(tucker.unfold(result, mode), matrix @ tucker.unfold(core, mode))
