"""The statistics of rows and keys: groups, grids, sets of any order, and a user's own."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from forward_problem import ALL, DEVICE, SIMPLE, Problem, attention, group_ids, normal
from headscope_kernels.attention import STATISTICS, BoundStatistic, RowStatistic
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.arguments import statistic_arguments
from headscope_kernels.attention.statistics import statistic_set

GROUPED = ("group_mass", "group_entropy")


@pytest.mark.parametrize(
    "statistics",
    [(), *((name,) for name in ALL), ("max_prob", "group_entropy", "entropy"), ("group_mass", "group_mass")],
)
def test_any_subset_in_any_order(statistics: tuple[str, ...]):
    attention(heads=1, queries=20, keys=40).check(statistics)


@pytest.mark.parametrize("count", [1, 5, 77, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_counts(count: int, dtype: torch.dtype):
    problem = attention(heads=1, queries=20, keys=100, dtype=dtype)
    problem.group_count = count
    problem.check(GROUPED)


def test_chunks_of_many_groups():
    """300 groups are asked for 128 at a time; ids outside of a chunk, or of any, are in none of its groups."""
    problem = attention(heads=1, queries=7, keys=100)
    problem.groups = group_ids(1, 1, 100, count=320)
    problem.group_count = 300
    for first, width in ((0, 128), (128, 128), (256, 44)):
        problem.first_group = first
        assert problem.bound("group_mass").statistic.width == width
        problem.check(GROUPED)


@pytest.mark.parametrize("shape", [(2, 1, 45), (2, 3, 45), (1, 3, 45)])
def test_groups_of_each_sample_and_head(shape: tuple[int, ...]):
    problem = attention(batch=2, heads=3, queries=20, keys=45)
    problem.groups = group_ids(*shape)
    problem.check(GROUPED)


def test_keys_without_a_group():
    problem = attention(queries=20, keys=45)
    problem.groups = torch.full((1, 1, 45), -1, dtype=torch.int32, device=DEVICE)
    _, values = problem.run(GROUPED)
    assert (values["group_mass"] == 0).all()
    assert (values["group_entropy"] == 0).all()


def test_groups_far_below_the_largest_logit():
    """The entropy within a group doesn't depend on the group's mass, until that vanishes from float32."""
    problem = attention(queries=20, keys=77)
    problem.groups = (torch.arange(77, dtype=torch.int32, device=DEVICE) // 20)[None, None]
    # groups of which each is e^-25 of the one before; the fourth is e^-75, the first of all in the last tile
    problem.key_bias = -25.0 * problem.groups.float().flip(-1)
    problem.check(GROUPED)
    problem.key_bias = -70.0 * problem.groups.float()
    _, values = problem.run(GROUPED)
    assert (values["group_mass"][..., 2:] == 0).all()
    assert (values["group_entropy"][..., 2:] == 0).all()
    problem.check(GROUPED)


def test_constant_and_one_hot_rows():
    problem = attention(queries=20, keys=77)
    problem.query.zero_()
    problem.attn_mask = torch.zeros(1, 1, 20, 77, device=DEVICE)
    problem.attn_mask[..., 10:, 30] = 1e4
    problem.check(ALL)
    _, values = problem.run()
    keys = torch.tensor(77.0)
    torch.testing.assert_close(values["entropy"][..., :10], keys.log().expand(1, 2, 10).to(DEVICE))
    torch.testing.assert_close(values["collision_entropy"][..., :10], keys.log().expand(1, 2, 10).to(DEVICE))
    for name in ("entropy", "collision_entropy"):
        assert (values[name][..., 10:] == 0).all(), name


def test_distance_between_different_grids():
    problem = attention(queries=40, keys=77)
    problem.check(("distance",))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 77), (100, 1), (1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_mass(queries: int, keys: int, dtype: torch.dtype):
    attention(batch=2, queries=queries, keys=keys, dtype=dtype).check_key_mass()


@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (70, 40)])
def test_key_mass_causal(queries: int, keys: int):
    problem = attention(heads=2, kv_heads=1, queries=queries, keys=keys)
    problem.is_causal = True
    problem.check_key_mass()
    problem.check_key_mass(ForwardConfiguration(16, 64))


@pytest.mark.parametrize("magnitude", [-1e4, 1e4])
def test_key_mass_of_extreme_logits(magnitude: float):
    problem = attention(queries=40, keys=77)
    problem.scale = magnitude / problem.logits().abs().max().item() * 0.25
    problem.check_key_mass()


def test_no_queries_have_no_mass():
    assert (attention(queries=0, keys=40).key_mass() == 0).all()


@triton.jit
def ahead_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """The sum of the weights times a number of every key, over the keys after the query; the same, times a constant."""
    numbers = tl.load(tensors[0] + columns, mask=columns < keys, other=0.0)  # [keys]
    ahead = (columns[None, :] > rows[:, None]) & (columns < keys)[None, :]  # [queries, keys]
    beyond = tl.sum(tl.where(ahead, weights * numbers[None, :], 0.0), 1)  # [queries]
    return accumulators[0] * rescale + CONSTANTS[0] * beyond, accumulators[1] * rescale[:, None] + beyond[:, None]


@triton.jit
def ahead_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return accumulators[1] / normaliser[:, None] + (accumulators[0] / normaliser)[:, None]


def weighted(factor: float) -> RowStatistic:
    """sum over keys after the query of (factor + 1) p_ij * number_j, three times over."""
    return RowStatistic(
        ahead_finish, update=ahead_update, accumulators=(0, 16), width=3, constants=(factor,), empty=7.0
    )


def own(problem: Problem, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = normal(1, 2, problem.keys)
    problem.attn_mask = torch.ones(problem.rows[2], 1, dtype=torch.bool, device=DEVICE)
    problem.attn_mask[5] = False
    (value,) = problem.call([BoundStatistic(weighted(factor), (numbers,))], None)
    expected = (problem.weights() * numbers.double()[:, :, None]).triu(1).sum(-1) * (factor + 1)
    expected[:, :, 5] = 7.0
    return value, expected[..., None].expand(*problem.rows, 3)


def test_a_user_made_statistic():
    """Rows, columns, data, constants, an accumulator with a width: all that a statistic can ask for."""
    for factor in (0.5, 2.0):
        value, expected = own(attention(queries=40, keys=77), factor)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)


def test_the_set_is_checked():
    entropy = STATISTICS["entropy"](())
    with pytest.raises(ValueError, match="if and only if"):
        statistic_set((replace(entropy, accumulators=()),))
    with pytest.raises(ValueError, match="power of two"):
        statistic_set((replace(entropy, accumulators=(24,)),))
    for constants in ((), (0,), (5, 5), (300, 0, 1)):
        with pytest.raises(ValueError, match="group statistics take constants"):
            STATISTICS["group_mass"](constants)


def test_outputs_and_data_are_checked():
    problem = attention(queries=4, keys=4)
    bound = problem.bound("group_mass")
    with pytest.raises(ValueError, match="as many outputs"):
        statistic_arguments([bound], [], problem.rows)
    with pytest.raises(ValueError, match="must be \\[batch or 1"):
        problem.call([bound._replace(tensors=(bound.tensors[0][0],))], None)
    with pytest.raises(ValueError, match="must broadcast"):
        problem.call([bound._replace(tensors=(group_ids(3, 1, 4),))], None)
    with pytest.raises(ValueError, match="output must be contiguous float32"):
        statistic_arguments([bound], [torch.zeros(problem.rows)], problem.rows)


def test_every_simple_statistic_is_registered():
    # others than these have tests of their own in tests/ops
    assert set(ALL) <= set(STATISTICS)
    assert all(STATISTICS[name](()).width == 0 for name in SIMPLE)
    assert math.isinf(STATISTICS["logsumexp"](()).empty)
