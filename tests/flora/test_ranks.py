"""Integers only: counts, clipping, and budgets that are kept and nearly used up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.ranks import (
    Weight,
    clip_ranks,
    default_kernel_rank,
    parameter_count,
    solve_budget,
    uniform_ranks,
    usable_ranks,
)

CONV = Weight((64, 32, 3, 3), ("out", "in", "kernel", "kernel"))
LINEAR = Weight((768, 3072), ("out", "in"))
DEPTHWISE = Weight((96, 1, 7, 7), ("out", "in", "kernel", "kernel"))
EXPERTS = Weight((8, 64, 128), ("other",) * 3)

weights = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 600), st.integers(1, 600)).map(lambda s: Weight(s, ("out", "in"))),
        st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 7), st.integers(1, 7)).map(
            lambda s: Weight(s, ("out", "in", "kernel", "kernel"))
        ),
    ),
    min_size=1,
    max_size=12,
)


def total(weights, ranks):
    return sum(parameter_count(w.shape, r) for w, r in zip(weights, ranks, strict=True))


def test_the_paper_s_count_of_a_convolution():
    r, r3 = 8, 2  # section 4.1: r3² r² + r (d_in + d_out) + 2 r3 k
    assert parameter_count(CONV.shape, (r, r, r3, r3)) == r3**2 * r**2 + r * (64 + 32) + 2 * r3 * 3


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (7, 4)])
def test_default_kernel_rank(size, rank):
    assert default_kernel_rank(size) == rank


def test_ranks_never_pass_the_mode():
    assert uniform_ranks(DEPTHWISE, 8, None) == (8, 1, 4, 4)
    assert uniform_ranks(EXPERTS, 100, None) == (8, 64, 100)
    assert uniform_ranks(CONV, 8, 9) == (8, 8, 3, 3)
    assert clip_ranks(CONV, [4, 99, 1, 3], None) == (4, 32, 1, 3)
    with pytest.raises(ValueError, match=r"2 ranks \[4, 4\].*4 modes.*\[64, 32, 3, 3\]"):
        clip_ranks(CONV, [4, 4], None)


@given(weights, st.floats(0.0005, 1.2), st.sampled_from([None, 1, 2]))
@settings(deadline=None, max_examples=200)
def test_a_budget_is_kept_and_nothing_more_would_fit(weights, share, kernel_rank):
    budget = max(1, int(share * sum(parameter_count(w.shape, w.shape) for w in weights)))
    least = total(weights, [tuple(1 for _ in w.shape) for w in weights])
    try:
        ranks = solve_budget(weights, budget, kernel_rank)
    except ValueError as error:
        assert "least possible" in str(error)
        assert int(str(error).rsplit(" ", 1)[1]) > budget
        return
    assert least <= total(weights, ranks) <= budget
    spare = budget - total(weights, ranks)
    for weight, rank in zip(weights, ranks, strict=True):
        for mode, size in enumerate(weight.shape):
            assert 1 <= rank[mode] <= size
            if weight.roles[mode] == "kernel" and kernel_rank is not None:
                assert rank[mode] <= kernel_rank
            elif rank[mode] < size:  # one more of this rank must not fit
                more = tuple(r + (n == mode) for n, r in enumerate(rank))
                assert parameter_count(weight.shape, more) - parameter_count(weight.shape, rank) > spare


def test_a_budget_is_used_up_to_two_per_cent():
    model = [CONV, LINEAR, DEPTHWISE, EXPERTS] * 6
    for budget in (30_000, 100_000, 330_000, 1_000_000):
        assert 0.98 * budget <= total(model, solve_budget(model, budget, None)) <= budget


def test_fixed_ranks_stay_and_the_rest_is_solved():
    fixed = Weight(LINEAR.shape, LINEAR.roles, (2, 3))
    ranks = solve_budget([fixed, CONV], 20_000, None)
    assert ranks[0] == (2, 3) and total([fixed, CONV], ranks) <= 20_000


def test_ranks_that_the_other_modes_cannot_use_come_last():
    stem = Weight((32, 1, 1, 1), CONV.roles)
    assert solve_budget([stem, LINEAR], 20_000, None)[1] == solve_budget([LINEAR], 20_000 - 36, None)[0]
    for ranks in solve_budget([CONV, LINEAR, DEPTHWISE] * 3, 60_000, None):
        assert ranks == usable_ranks(ranks)
    assert solve_budget([stem], 300, None) == [(9, 1, 1, 1)]  # with nothing else to spend on
    assert usable_ranks((8, 2)) == (2, 2) and usable_ranks((5,)) == (5,) and usable_ranks((9, 1, 3, 1)) == (3, 1, 3, 1)
