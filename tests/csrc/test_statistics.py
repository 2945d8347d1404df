"""Every statistic and every edit of the C++ kernel against the formulas in float64, written apart from the library."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import definitions
from contract import assert_close
from headscope.ops import cpu_library

POISON = 777.0
# a value that no statistic has
FAINT = -12345.0


@dataclass
class Call:
    """Arguments of cpu_library.attention_forward; statistics by a name of their own."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 0.3
    gate: Tensor | None = None
    fill: Tensor | None = None
    temperature: Tensor | None = None
    key_bias: Tensor | None = None
    key_scale: Tensor | None = None
    statistics: dict[str, tuple] = field(default_factory=dict)

    def sizes(self) -> tuple[int, int, int, int]:
        batch, heads, queries = self.query.shape[:3]
        return batch, heads, queries, self.key.shape[2]


def run(call: Call, threads: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The kernel's output and statistics, from poisoned buffers."""
    batch, heads, queries, keys = call.sizes()
    output = torch.full((batch, heads, queries, call.value.shape[3]), POISON, dtype=call.query.dtype)
    outputs = {}
    for label, (name, constants, _) in call.statistics.items():
        shape = (batch, heads, keys if name == "key_mass" else queries)
        if name.startswith("group"):
            shape = (*shape, constants[0] if len(constants) == 1 else min(128, constants[0] - constants[1]))
        outputs[label] = torch.full(shape, POISON)
    options = {name: value for name, value in vars(call).items() if name not in ("query", "key", "value", "statistics")}
    cpu_library.attention_forward(
        call.query,
        call.key,
        call.value,
        **options,
        statistics=tuple(call.statistics.values()),
        output=output,
        statistic_outputs=tuple(outputs.values()),
        threads=threads,
    )
    return output, outputs


def expected_statistic(
    name: str, constants: tuple[int, ...], tensors: tuple[Tensor, ...], logits: Tensor, weights: Tensor
) -> Tensor:
    """[batch, heads, queries], with groups behind, or [batch, heads, keys]; weights are the probabilities."""
    if name in definitions.ROWS:
        return definitions.ROWS[name](logits, weights)
    if name == "distance":
        return definitions.distance(weights, constants[1], constants[3])
    if name == "key_mass":
        return definitions.key_mass(weights)
    first, count = 0, constants[0]
    if len(constants) == 2:
        first, count = constants[1], min(128, count - constants[1])
    # what float32 can't hold beside the row's largest weight counts as nothing
    mass, entropy = definitions.groups(weights, tensors[0], range(first, first + count), 2.0**-126)
    if name == "group_mass":
        return mass
    # where some keys of a group fall below what float32 holds and others don't, rounding decides: not compared
    largest = weights.amax(-1, keepdim=True) if weights.shape[-1] else weights.new_zeros(*weights.shape[:-1], 1)
    return torch.where((mass > 0) & (mass < largest * 2.0**-100), FAINT, entropy)


def truth(call: Call) -> tuple[Tensor, dict[str, Tensor], float]:
    """Output and statistics in float64, and the largest finite |logit|."""
    names = ("scale", "temperature", "key_bias", "attn_mask", "is_causal")
    found = definitions.scores(call.query, call.key, **{name: getattr(call, name) for name in names})
    weights = found.probabilities
    scaled = weights if call.key_scale is None else weights * call.key_scale.double()[:, :, None]
    fill = torch.zeros(()) if call.fill is None else call.fill
    attention = scaled @ definitions.for_every_head(call.value, call.query.shape[1])
    output = definitions.blended(attention, call.gate, fill.double())
    finite = found.logits[found.logits.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    statistics = {label: expected_statistic(*spec, found.logits, weights) for label, spec in call.statistics.items()}
    return output, statistics, largest


def check(call: Call, threads: int | None = None) -> None:
    output, statistics = run(call, threads)
    expected, expected_statistics, largest = truth(call)
    # a logit errs by four units in its last place, and every probability by as much
    tolerance = 1e-5 + 4 * 2.0**-24 * largest
    _, _, queries, keys = call.sizes()
    for label, (name, constants, _) in call.statistics.items():
        unit = 1.0
        if name == "distance":
            unit = 1.0 + max(queries // constants[1] + keys // constants[3], constants[1] + constants[3])
        if name == "key_mass":
            unit = 1.0 + float(expected_statistics[label].nan_to_num().amax()) if keys else 1.0
        got = torch.where(expected_statistics[label] == FAINT, FAINT, statistics[label])
        assert_close(label, got, expected_statistics[label], unit * tolerance)
    low = call.query.dtype != torch.float32
    # the weights are rounded to bfloat16 where they meet bfloat16 values: half a unit in the last place of each
    unit = 2 * torch.finfo(call.query.dtype).eps if low else 2e-6 + 2 * tolerance
    size = float(call.value.abs().amax()) if call.value.numel() else 0.0
    if call.key_scale is not None and keys:
        size *= max(1.0, float(call.key_scale.abs().amax()))
    if call.fill is not None:
        size += float(call.fill.abs().amax())
    assert_close("output", output, expected, unit * size + 1e-6)


def make(batch=2, heads=4, kv_heads=2, queries=37, keys=77, dim=24, dim_v=20, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key = torch.randn(batch, kv_heads, keys, dim).to(dtype)
    return Call(query, key, torch.randn(batch, kv_heads, keys, dim_v).to(dtype), **options)


def every_statistic(batch: int, heads: int, queries: int, keys: int, groups: int = 8, width: int = 7) -> dict:
    runs = (torch.arange(keys) * (groups + 1) // max(1, keys) - 1).int()[None, None]
    mixed = torch.randint(-1, groups + 1, (batch, heads, keys), dtype=torch.int32)
    return {
        **{name: (name, (), ()) for name in ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")},
        "distance": ("distance", (queries // width + 1, width, keys // 5 + 1, 5), ()),
        "other distance": ("distance", (1, queries + 1, keys + 1, 1), ()),
        "runs": ("group_mass", (groups,), (runs,)),
        "entropies of runs": ("group_entropy", (groups,), (runs,)),
        "mixed": ("group_mass", (groups,), (mixed,)),
        "entropies of mixed": ("group_entropy", (groups,), (mixed[:1, :1],)),
        "key_mass": ("key_mass", (), ()),
    }


EDITS = {
    "none": {},
    "causal": {"is_causal": True},
    "temperature": {"temperature": torch.tensor([[0.3, 1.0, 2.0, 7.0]])},
    "negative temperature": {"temperature": torch.tensor([[-1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -0.5]])},
    "key_bias": {"key_bias": torch.linspace(-3, 3, 77)[None, None]},
    "muted": {"key_bias": torch.where(torch.arange(154).view(2, 1, 77) % 3 == 0, -math.inf, 0.5)},
    "all muted": {"key_bias": torch.tensor([-math.inf, 0.0, -math.inf, 0.0])[None, :, None].repeat(1, 1, 77)},
    "key_scale": {"key_scale": torch.linspace(-1, 2, 77 * 8).view(2, 4, 77)},
    "mask and bias": {
        "attn_mask": (torch.arange(77) % 5 != torch.arange(37)[:, None] % 5)[None, None],
        "key_bias": torch.linspace(-9, 3, 77 * 4).view(1, 4, 77),
        "key_scale": torch.linspace(0, 1, 77)[None, None],
        "gate": torch.tensor([[0.0, 1.0, 0.5, 0.25], [1.0, 0.0, -0.5, 2.0]]),
        "fill": torch.linspace(0, 1, 80).view(1, 4, 1, 20),
        "temperature": torch.tensor([[0.5, 1.0, 2.0, 4.0]]),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit, dtype, instruction_set, library):
    call = make(dtype=dtype, **EDITS[edit])
    call.statistics = every_statistic(*call.sizes())
    check(call)


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 70, "keys": 1100, "heads": 2, "batch": 1},
        {"queries": 300, "keys": 600, "heads": 2, "batch": 1, "dim": 40, "dim_v": 40},
        {"queries": 1, "keys": 513, "heads": 6, "kv_heads": 1},
        {"queries": 5, "keys": 1},
        {"queries": 3, "keys": 0},
        {"queries": 0, "keys": 9},
        {"queries": 9, "keys": 9, "dim": 1, "dim_v": 1},
        {"queries": 9, "keys": 33, "dim": 0, "dim_v": 8},
        {"queries": 9, "keys": 33, "dim": 8, "dim_v": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(sizes, dtype, instruction_set, library):
    call = make(**sizes, dtype=dtype)
    call.statistics = every_statistic(*call.sizes())
    check(call)


@pytest.mark.parametrize("dim_v", [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 104, 120])
def test_widths_of_values(dim_v, instruction_set, library):
    """Every way in which channels are cut into panels, over more than one block of keys."""
    for dtype in (torch.float32, torch.bfloat16):
        check(make(1, 2, 2, 9, 530, 16, dim_v, dtype))


@pytest.mark.parametrize("count", [1, 16, 77, 300])
def test_many_groups(count, instruction_set, library):
    call = make(1, 2, 1, 20, 700)
    groups = torch.randint(-1, count, (1, 1, 700), dtype=torch.int32)
    call.statistics = {name: (name, (count,), (groups,)) for name in ("group_mass", "group_entropy")}
    if count > 128:
        call.statistics["chunk"] = ("group_entropy", (count, 128), (groups,))
        call.statistics["last chunk"] = ("group_mass", (count, 256), (groups,))
    check(call)


def test_groups_far_below_the_largest_weight(instruction_set, library):
    """Down to where float32 holds nothing of a group beside the row's largest weight."""
    call = make(1, 1, 1, 4, 640, 8)
    groups = (torch.arange(640) // 64).int()[None, None]
    # the largest come in the second block, so that the first one's sums have to move
    call.key_bias = -16.0 * (9 - torch.arange(640) // 64).float()[None, None]
    call.statistics = {name: (name, (10,), (groups,)) for name in ("group_mass", "group_entropy")}
    check(call)
    mass, entropy = run(call)[1].values()
    assert (mass[..., :4] == 0).all()
    assert (entropy[..., :4] == 0).all()
    assert (entropy[..., 4:] > 0).all()


def test_nan_reaches_every_statistic_of_its_row(instruction_set, library):
    call = make(1, 2, 2, 20, 600)
    call.query[0, 0, 3, 1] = math.nan
    call.statistics = every_statistic(*call.sizes())
    output, statistics = run(call)
    for label, values in statistics.items():
        bad = values.isnan() if values.ndim == 3 else values.isnan().all(-1)
        assert not values[0, 1].isnan().any()
        if label == "key_mass":
            assert bad[0, 0].all()
        else:
            assert bad[0, 0].tolist() == [row == 3 for row in range(20)], label
    assert output[0, 0, 3].isnan().all()


@pytest.mark.parametrize("name", ["key_bias", "key_scale"])
def test_what_is_muted_does_not_reach_a_row(name, instruction_set, library):
    """NaN and infinity in a muted key, its value or its scale."""
    bias, scale = torch.zeros(1, 1, 60), torch.ones(1, 1, 60)
    bias[..., 30] = -math.inf
    call = make(1, 2, 2, 20, 60, key_bias=bias)
    expected = truth(call)
    if name == "key_scale":
        scale[..., 30] = math.inf
        call.key_scale = scale
    else:
        call.key[..., 30, 2], call.value[..., 30, 3] = math.nan, math.inf
    call.statistics = {"entropy": ("entropy", (), ())}
    output, statistics = run(call)
    assert_close("output", output, expected[0], 1e-5)
    assert not statistics["entropy"].isnan().any()


def test_statistics_do_not_change_the_output_nor_threads_anything(instruction_set, library):
    for dtype in (torch.float32, torch.bfloat16):
        call = make(1, 4, 2, 300, 700, dtype=dtype)
        plain, _ = run(call, 1)
        call.statistics = every_statistic(*call.sizes())
        one, first = run(call, 1)
        assert torch.equal(plain, one)
        for threads in (2, 3):
            several, again = run(call, threads)
            assert torch.equal(one, several)
            assert all(torch.equal(first[label], again[label]) for label in first)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        ("mean", "got 'mean'"),
        (("distance", (2, 3), ()), "four grid sizes"),
        (("distance", (2, 3, 0, 1), ()), "expected integers"),
        (("group_mass", (), ()), "its count and its groups"),
        (("group_mass", (70_000,), (torch.zeros(1, 1, 77).int(),)), "70000 groups"),
        (("group_mass", (2,), (torch.zeros(1, 1, 76).int(),)), "groups: got shape"),
        (("group_mass", (2,), (torch.zeros(1, 1, 77),)), "groups: got dtype"),
    ],
    ids=str,
)
def test_refuses_statistics_that_do_not_fit(statistic, message, library):
    call = make()
    call.statistics = {"it": statistic}
    with pytest.raises(ValueError, match=message):
        cpu_library.attention_forward(
            call.query,
            call.key,
            call.value,
            attn_mask=None,
            is_causal=False,
            scale=1.0,
            statistics=(statistic,),
            output=torch.empty(2, 4, 37, 20),
            statistic_outputs=(torch.empty(2, 4, 37),),
        )


def columns(tensor: Tensor) -> Tensor:
    """No stride is 1."""
    wide = torch.empty(*tensor.shape[:2], 2 * tensor.shape[3], tensor.shape[2], dtype=tensor.dtype).mT
    wide[..., ::2] = tensor
    return wide[..., ::2]


def heads_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = [lambda tensor: tensor, heads_last, columns]


@st.composite
def calls(draw) -> Call:
    """Any call: shapes, dtype, strides, masks, edits and statistics."""
    size = st.integers(1, 70)
    kv_heads, shared, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * shared
    queries, keys = draw(size), draw(st.one_of(size, st.integers(0, 2), st.integers(500, 540)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 1000))
    call = make(batch, heads, kv_heads, queries, keys, draw(size), draw(size), dtype, seed)
    call.query *= draw(st.sampled_from([0.0, 1.0, 20.0]))
    call.query, call.key, call.value = (
        draw(st.sampled_from(LAYOUTS))(tensor) for tensor in (call.query, call.key, call.value)
    )
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive"]))
    shape = [draw(st.sampled_from([1, full])) for full in (batch, heads, queries, keys)]
    if kind == "causal":
        call.is_causal = True
    elif kind == "bool":
        call.attn_mask = torch.rand(shape) > 0.4
    elif kind == "additive":
        added = torch.where(torch.rand(shape) > 0.7, -math.inf, torch.randn(shape))
        call.attn_mask = added.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    over = [draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), keys]
    if draw(st.booleans()):
        call.key_bias = torch.where(torch.rand(over) > 0.8, -math.inf, torch.randn(over))
    if draw(st.booleans()):
        call.key_scale = torch.randn(over)
    if draw(st.booleans()):
        call.temperature = 0.2 + torch.rand(over[0], heads)
    if draw(st.booleans()):
        call.gate = torch.randint(0, 3, (over[0], heads)) / 2.0
        call.fill = draw(st.sampled_from([None, torch.randn(1, heads, 1, call.value.shape[3])]))
    statistics = every_statistic(*call.sizes(), draw(st.integers(1, 20)), draw(st.integers(1, 9)))
    chosen = draw(st.sets(st.sampled_from(sorted(statistics))))
    call.statistics = {label: statistics[label] for label in sorted(chosen)}
    return call


def check_anything(library, call: Call, instruction_set: str, threads: int) -> None:
    before = library.instruction_set
    library.instruction_set = instruction_set
    try:
        library.instruction_set_name()
    except RuntimeError:
        return
    else:
        check(call, threads)
    finally:
        library.instruction_set = before


ANYTHING = given(
    call=calls(),
    instruction_set=st.sampled_from(["baseline", "avx2", "avx512", "avx512_bf16"]),
    threads=st.integers(1, 3),
)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, derandomize=True, **RELAXED)
@ANYTHING
def test_anything(library, call, instruction_set, threads):
    check_anything(library, call, instruction_set, threads)


@pytest.mark.full
@settings(max_examples=200, **RELAXED)
@ANYTHING
def test_anything_at_length(library, call, instruction_set, threads):
    check_anything(library, call, instruction_set, threads)
