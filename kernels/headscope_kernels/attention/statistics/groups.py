"""Statistics of groups of keys: text tokens, regions, frames.

A group's sum over the keys is a matrix product with the one-hot matrix [keys, groups], which runs beside the value
product on the matrix units. One-hot is exact in bfloat16; the float32 factor goes in as several bfloat16 terms, each
the rounding of what the ones before left: two are right to 2^-17 of the value, enough for a mass of at most 1, three to
2^-24, which the entropy needs, as it divides by masses of any size. Products of one tile start from 0 and are added in
float32, because the matrix units truncate while they accumulate.
"""

import triton
import triton.language as tl

from headscope_kernels.attention.statistics.contract import LN2, RowStatistic, register

# the smallest float32 with all of its digits
LEAST_MASS = tl.constexpr(2.0**-126)
# as many groups as one pass accumulates: [queries, 128] float32, what a value of 128 channels takes
MAXIMUM_GROUPS = 128


@triton.constexpr_function
def interpreting():
    """Under Triton's interpreter, which can't multiply bfloat16 but needn't hurry either."""
    return triton.knobs.runtime.interpret


@triton.constexpr_function
def first_group(constants):
    """The id of the group in column 0."""
    return constants[1] if len(constants) > 1 else 0


@triton.constexpr_function
def padded_groups(constants):
    """The columns of the one-hot matrix: a power of two that tl.dot takes."""
    groups = min(constants[0] - (constants[1] if len(constants) > 1 else 0), 128)
    return max(16, 1 << (groups - 1).bit_length())


@triton.jit
def memberships(columns, keys, groups_ptr, CONSTANTS: tl.constexpr):
    """True where key j is in group g: bool [keys, padded groups]. A group id outside of the range is in none."""
    ids = tl.load(groups_ptr + columns, mask=columns < keys, other=-1)  # [keys]
    groups = first_group(CONSTANTS) + tl.arange(0, padded_groups(CONSTANTS))  # [groups]
    return ids[:, None] == groups[None, :]


@triton.jit
def one_hot_product(left, selection, TERMS: tl.constexpr):
    """left [rows, inner] . selection [inner, columns], float32; selection is bool."""
    if interpreting():
        return tl.dot(left, selection.to(tl.float32), input_precision="ieee")
    one_hot = selection.to(tl.float32).to(tl.bfloat16)  # [inner, columns]
    rest = left  # [rows, inner]
    product = tl.zeros([left.shape[0], selection.shape[1]], tl.float32)  # [rows, columns]
    for _ in tl.static_range(1, TERMS):
        if TERMS == 2:
            term = rest.to(tl.bfloat16).to(tl.float32)
        else:
            # the upper half of a float32 is a bfloat16, for one instruction; three terms can spare the rounding
            term = (rest.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        product = tl.dot(term.to(tl.bfloat16), one_hot, product)
        rest = rest - term
    return tl.dot(rest.to(tl.bfloat16), one_hot, product)


@triton.jit
def group_mass_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """The weights' sum in every group, [queries, groups]."""
    own = one_hot_product(weights, memberships(columns, keys, tensors[0], CONSTANTS), 2)
    # an FMA, or the compiler would make the sum so far the product's starting point
    return (tl.fma(accumulators[0], tl.broadcast_to(rescale[:, None], own.shape), own),)


@triton.jit
def group_mass_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return accumulators[0] / normaliser[:, None]


@triton.jit
def group_mass_gradient(grad, log_probability, rows, columns, keys, tensors, CONSTANTS: tl.constexpr):
    """grad[i, group(j)]: [queries, keys]."""
    return one_hot_product(grad, tl.trans(memberships(columns, keys, tensors[0], CONSTANTS)), 2)


@triton.jit
def group_entropy_update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    """The sums of w and of w x in every group, as the entropy of a whole row has them."""
    members = memberships(columns, keys, tensors[0], CONSTANTS)  # [keys, groups]
    mass = one_hot_product(weights, members, 3)  # [queries, groups]
    moment = one_hot_product(weights * exponents, members, 3)  # [queries, groups]
    by = tl.broadcast_to(rescale[:, None], mass.shape)
    moved = tl.fma(accumulators[0], tl.broadcast_to(shift[:, None], mass.shape), accumulators[1])
    return (tl.fma(accumulators[0], by, mass), tl.fma(moved, by, moment))


@triton.jit
def group_entropy_finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    """ln m - ln(2) t / m of every group, 0 for one without mass, or with too little to have digits."""
    mass, moment = accumulators
    absent = mass < LEAST_MASS  # [queries, groups]
    mass = tl.where(absent, 1.0, mass)
    entropy = LN2 * (tl.log2(mass) - moment / mass)  # [queries, groups]
    # of a single key it is 0 but for rounding; a NaN stays
    return tl.where(absent | (entropy < 0.0), 0.0, entropy)


def group_width(constants: tuple[int | float, ...]) -> int:
    """The groups that one statistic with these constants, (count,) or (count, first), has.

    Raises:
        ValueError: constants that leave no group.
    """
    count, first = (int(constant) for constant in (*constants, 0)[:2]) if constants else (0, 0)
    if not (0 <= first < count) or len(constants) > 2:
        raise ValueError(
            f"group statistics take constants (count,) or (count, first) with first < count, got {constants}"
        )
    return min(count - first, MAXIMUM_GROUPS)


def group_mass(constants: tuple[int | float, ...]) -> RowStatistic:
    """Constants are (count,) or (count, first): the first 128 groups from `first` on."""
    width = group_width(constants)
    return RowStatistic(
        group_mass_finish,
        update=group_mass_update,
        accumulators=(padded_groups(constants),),
        width=width,
        constants=constants,
        gradient=group_mass_gradient,
    )


def group_entropy(constants: tuple[int | float, ...]) -> RowStatistic:
    """Constants are (count,) or (count, first): the first 128 groups from `first` on."""
    width = group_width(constants)
    return RowStatistic(
        group_entropy_finish,
        update=group_entropy_update,
        accumulators=(padded_groups(constants),) * 2,
        width=width,
        constants=constants,
    )


register("group_mass", group_mass)
register("group_entropy", group_entropy)
