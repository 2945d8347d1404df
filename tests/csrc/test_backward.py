"""The C++ backward below the operator: every gradient against float64, and the edges of its contract."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from contract import FINFO_MIN, Case, Inputs, make_inputs
from csrc.conftest import POISON, backward_arguments
from csrc.test_contract import CASES, LOW_PRECISION
from gradient_truth import Cotangents, Gradient, leaves_of, random_cotangents, truth, worst
from headscope.ops import cpu_library

# a NaN has no gradient to compare
SOUND = [case for case in CASES if case.poison is None or "nan" not in case.name]
ALL = ("output", "entropy", "logsumexp", "group_mass")


def make(queries=21, keys=60, heads=2, kv_heads=None, dim=16, dtype=torch.float32, **changes) -> Inputs:
    torch.manual_seed(0)
    options = {"attn_mask": None, "is_causal": False, "scale": None}
    options |= {name: changes.pop(name) for name in tuple(changes) if name in options}
    kv_heads = kv_heads or heads
    query = torch.randn(1, heads, queries, dim).to(dtype)
    key, value = (torch.randn(1, kv_heads, keys, dim).to(dtype) for _ in range(2))
    return Inputs(query, key, value, options, **{"gate": None, "fill": None, **changes})


def check(got: dict[str, Tensor], expected: dict[str, Gradient]) -> None:
    for name, gradient in got.items():
        ratio = worst(gradient, expected[name])
        assert ratio <= 1.0, f"{name}: {ratio:.3g} times what is allowed"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, a NaN like any other."""
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(POISON), b[n].nan_to_num(POISON)) for n in a)


# float32 has no dot products of its own
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_float32(case: Case, instruction_set, differentiate):
    _check_case(case, torch.float32, instruction_set, differentiate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in SOUND if case.name in LOW_PRECISION], ids=lambda case: case.name)
def test_low_precision(case: Case, dtype, instruction_set, differentiate):
    _check_case(case, dtype, instruction_set, differentiate)


def _check_case(case: Case, dtype: torch.dtype, instruction_set: str, differentiate: Callable) -> None:
    """Two cotangents of everything, then one of each alone."""
    inputs = make_inputs(case, dtype)
    cotangents = random_cotangents(inputs, 2, ALL)
    # float32 inside, except where bfloat16 numbers meet in pairs
    dots = dtype == torch.bfloat16 and instruction_set == "avx512_bf16"
    rounded = None if dots else 0.0
    check(differentiate(inputs, cotangents), truth(inputs, cotangents, rounded))
    for name, cotangent in cotangents.given().items():
        alone = Cotangents(**{name: cotangent[:1]})
        check(differentiate(inputs, alone), truth(inputs, alone, rounded))


EVERYTHING = Case(
    "everything",
    (2, 4, 2, 70, 530, 24, 20),
    mask=lambda b, h, q, k: torch.randn(1, h, q, k).masked_fill(torch.rand(1, h, q, k) < 0.3, -math.inf),
    is_causal=True,
    gate=lambda b, h: torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0, 0.3, 0.0, 1.0]]),
    fill=lambda b, h, q, d: torch.randn(b, 1, q, d),
    temperature=lambda b, h: 0.5 + torch.rand(1, h),
    key_bias=lambda b, h, k: torch.randn(b, 1, k).masked_fill(torch.rand(b, 1, k) < 0.2, -math.inf),
    key_scale=lambda b, h, k: torch.randn(1, h, k),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_alone(dtype, instruction_set, differentiate):
    """Whatever else is wanted, and with one cotangent, three or seven."""
    inputs = make_inputs(EVERYTHING, dtype)
    cotangents = random_cotangents(inputs, 7, ALL)
    expected = truth(inputs, cotangents)
    check(differentiate(inputs, cotangents), expected)
    for name in expected.keys() - {"fill"}:
        names = {name, "query"} if name == "temperature" else {name}
        check(differentiate(inputs, cotangents, names), expected)
    for count in (1, 3):
        some = Cotangents(**{name: tensor[:count] for name, tensor in cotangents.given().items()})
        check(
            differentiate(inputs, some),
            {n: Gradient(g.value[:count], g.tolerance[:count]) for n, g in expected.items()},
        )


def test_cotangents_in_several_passes(library, differentiate):
    """More than a thread has memory for: every pass takes up where the one before it ended."""
    inputs = make_inputs(dataclasses.replace(EVERYTHING, shape=(2, 4, 2, 9, 21, 8, 8)), torch.float32)
    cotangents = random_cotangents(inputs, 150, ALL)
    got = differentiate(inputs, cotangents)
    last = Cotangents(**{name: tensor[-2:].contiguous() for name, tensor in cotangents.given().items()})
    check({name: gradient[-2:] for name, gradient in got.items()}, truth(inputs, last))


def test_logits_far_below_zero(instruction_set, differentiate):
    """Keys behind the last have logits of 0, far above those of the row: they weigh nothing."""
    inputs = make(keys=61, dim=8, dtype=torch.bfloat16, scale=1.0)
    inputs.query[..., 0], inputs.key[..., 0] = 30.0, -30.0
    cotangents = random_cotangents(inputs, 2, ("output", "entropy"))
    got = differentiate(inputs, cotangents)
    assert all(gradient.isfinite().all() for gradient in got.values())


@pytest.mark.parametrize(
    "sizes", [(b, h, q, k) for b in (1, 2) for h in (1, 4) for q in (1, 70) for k in (1, 530)], ids=str
)
def test_masks_that_repeat(sizes, library, differentiate):
    """A mask's gradient in its own sizes."""
    inputs = make_inputs(dataclasses.replace(EVERYTHING, mask=lambda *_: torch.randn(sizes)), torch.float32)
    cotangents = random_cotangents(inputs, 2, ALL)
    check(differentiate(inputs, cotangents, {"attn_mask"}), truth(inputs, cotangents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "long", "wide", "edits"])
def test_threads_do_not_change_a_bit(kind, dtype, instruction_set, differentiate):
    inputs = {
        "plain": lambda: make(700, 700, dtype=dtype),
        "causal": lambda: make(700, 700, dtype=dtype, is_causal=True),
        "long": lambda: make(90, 3000, heads=1, dtype=dtype),
        "wide": lambda: make(130, 1100, heads=2, kv_heads=1, dim=200, dtype=dtype),
        "edits": lambda: make_inputs(EVERYTHING, dtype),
    }[kind]()
    cotangents = random_cotangents(inputs, 2, ALL if inputs.groups is not None else ALL[:3])
    one = differentiate(inputs, cotangents, threads=1)
    for threads in (2, 3, 7):
        assert equal(one, differentiate(inputs, cotangents, threads=threads)), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [60, 1100])
def test_strides(keys, dtype, instruction_set, differentiate):
    """Gradients inside of larger tensors, and any layout of cotangents: the same numbers, and nothing beside them."""
    inputs = make(heads=4, kv_heads=2, keys=keys, dtype=dtype)
    cotangents = random_cotangents(inputs, 2, ("output", "entropy"))
    expected = differentiate(inputs, cotangents)
    for channel_step in (1, 2):
        whole, parts = {}, {}
        for name, tensor in leaves_of(inputs).items():
            batch, heads, tokens, dim = tensor.shape
            whole[name] = torch.full((batch, tokens + 2, 3, 2 * heads, channel_step * dim + 5), POISON).to(dtype)
            taken = whole[name][:, 1:-1, :2, ::2, 3 : 3 + channel_step * dim : channel_step]
            parts[name] = taken.permute(2, 0, 3, 1, 4)
        assert cotangents.output is not None
        turned = cotangents.output.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)
        got = differentiate(inputs, dataclasses.replace(cotangents, output=turned), into=parts)
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)
            parts[name].fill_(POISON)
            assert bool((whole[name] == torch.tensor(POISON).to(dtype)).all()), f"{name}: more is written"


def test_repeated_cotangents(instruction_set, differentiate):
    """Those of a sum have strides of 0."""
    inputs = make(keys=600)
    one = torch.randn(1, 1, 1, 1, 1)
    repeated = Cotangents(one.expand(3, 1, 2, 21, 16))
    whole = Cotangents(one.expand(3, 1, 2, 21, 16).contiguous())
    assert equal(differentiate(inputs, repeated), differentiate(inputs, whole))


def _masks(kind: str, seen: Tensor) -> dict:
    """Options and edits of a call in which a row sees key j where `seen` [21, 60] is True."""
    if kind == "bool":
        return {"attn_mask": seen[None, None]}
    if kind == "additive":
        return {"attn_mask": torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -math.inf)}
    return {"is_causal": True}


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal", "key_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_no_row_sees_reaches_no_gradient(dtype, kind, special, where, instruction_set, differentiate):
    """A key that is hidden from all may hold anything."""
    queries, keys, hidden = 21, 60, 30
    seen = torch.rand(queries, keys) > 0.3
    seen[:, hidden] = False
    if kind == "key_bias":
        changes = {"key_bias": torch.zeros(1, 1, keys).index_fill(2, torch.tensor(hidden), -math.inf)}
    else:
        changes = _masks(kind, seen)
    inputs = make(queries, keys, dtype=dtype, **changes)
    cotangents = random_cotangents(inputs, 2)
    clean = differentiate(inputs, cotangents)
    getattr(inputs, where)[0, 0, hidden, 3] = special
    got = differentiate(inputs, cotangents)
    assert equal(got, clean)
    assert not got["key"][:, 0, :, hidden].any()
    assert not got["value"][:, 0, :, hidden].any()


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_a_nan_reaches_the_rows_that_see_it(kind, where, instruction_set, differentiate):
    """Their own gradients are NaN, and no other row's: nor those of keys that none of them sees."""
    position = 12
    queries, keys = 21, 60
    torch.manual_seed(1)
    seen = torch.rand(queries, keys) > 0.6
    if kind == "causal":
        seen = torch.ones(queries, keys, dtype=torch.bool).tril()
    inputs = make(queries, keys, **_masks(kind, seen))
    cotangents = random_cotangents(inputs, 1)
    clean = differentiate(inputs, cotangents)
    getattr(inputs, where)[0, 0, position, 3] = math.nan
    got = differentiate(inputs, cotangents)
    bad = seen[:, position]
    assert got["query"][0, 0, 0, bad].isnan().all()
    assert torch.equal(got["query"][0, 0, 0, ~bad], clean["query"][0, 0, 0, ~bad])
    # keys that some bad row sees
    reached = seen[bad].any(0)
    assert got["key"][0, 0, 0, reached].isnan().all()
    assert torch.equal(got["key"][0, 0, 0, ~reached], clean["key"][0, 0, 0, ~reached])
    assert torch.equal(got["value"][0, 0, 0, ~reached], clean["value"][0, 0, 0, ~reached])
    for name in ("query", "key", "value"):
        assert torch.equal(got[name][:, :, 1], clean[name][:, :, 1]), name


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("keys", [60, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_query_row_stays_there(dtype, keys, kind, instruction_set, differentiate):
    """It reaches the gradients of the keys that it sees, and no others."""
    row, queries = 7, 21
    torch.manual_seed(1)
    seen = torch.rand(queries, keys) > 0.5
    if kind in ("none", "causal"):
        seen = torch.ones(queries, keys, dtype=torch.bool)
    if kind == "causal":
        seen = seen.tril()
    inputs = make(queries, keys, dtype=dtype, **({} if kind == "none" else _masks(kind, seen)))
    cotangents = random_cotangents(inputs, 2)
    clean = differentiate(inputs, cotangents)
    inputs.query[0, 0, row, 2] = math.nan
    got = differentiate(inputs, cotangents)
    _check_row(got, clean, row, seen[row])


def _check_row(got: dict[str, Tensor], clean: dict[str, Tensor], row: int, seen: Tensor) -> None:
    """Head 0's row has a gradient of NaN, and so have the keys that it sees; all else is as it was."""
    others = torch.arange(got["query"].shape[3]) != row
    assert got["query"][:, 0, 0, row].isnan().all()
    assert torch.equal(got["query"][:, 0, 0, others], clean["query"][:, 0, 0, others])
    for name in ("key", "value"):
        assert got[name][:, 0, 0, seen].isnan().all(), name
        assert torch.equal(got[name][:, 0, 0, ~seen], clean[name][:, 0, 0, ~seen]), name
    for name in ("query", "key", "value"):
        assert torch.equal(got[name][:, :, 1], clean[name][:, :, 1]), name


@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cotangent_that_is_no_number(dtype, special, kind, instruction_set, differentiate):
    """It reaches its own row's gradient and those of the keys that the row sees; another cotangent stays clean."""
    row, queries, keys = 7, 21, 60
    torch.manual_seed(1)
    seen = torch.rand(queries, keys) > 0.5
    if kind != "bool":
        seen = torch.ones(queries, keys, dtype=torch.bool)
    if kind == "causal":
        seen = seen.tril()
    inputs = make(queries, keys, dtype=dtype, **({} if kind == "none" else _masks(kind, seen)))
    cotangents = random_cotangents(inputs, 2)
    clean = differentiate(inputs, cotangents)
    assert cotangents.output is not None
    cotangents.output[0, 0, 0, row] = special
    got = differentiate(inputs, cotangents)
    first = {name: gradient[:1] for name, gradient in got.items()}
    if math.isnan(special):
        _check_row(first, {name: gradient[:1] for name, gradient in clean.items()}, row, seen[row])
    others = torch.arange(queries) != row
    assert not first["query"][:, 0, 0, row].isfinite().any()
    assert torch.equal(first["query"][:, 0, 0, others], clean["query"][:1, 0, 0, others])
    assert torch.equal(first["value"][:, 0, 0, ~seen[row]], clean["value"][:1, 0, 0, ~seen[row]])
    assert not first["value"][:, 0, 0, seen[row]].isfinite().any()
    for name, gradient in got.items():
        assert torch.equal(gradient[1], clean[name][1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_removed_head_stays_there(dtype, instruction_set, differentiate):
    """Nothing of a head whose gate is 0 reaches a gradient but the gate's own, unless a statistic looks at the head."""
    inputs = make(
        heads=4,
        kv_heads=2,
        dtype=dtype,
        gate=torch.tensor([[0.0, 1.0, 1.0, 0.5]]),
        temperature=torch.tensor([[1.0, 2.0, 1.0, 1.0]]),
        key_bias=torch.randn(1, 4, 60),
        key_scale=torch.randn(1, 4, 60),
    )
    cotangents = random_cotangents(inputs, 2)
    alone = Cotangents(cotangents.output)
    clean = differentiate(inputs, alone)
    check(clean, truth(inputs, alone))
    inputs.query[0, 0] = math.nan
    got = differentiate(inputs, alone)
    for name in ("query", "temperature", "key_bias", "key_scale"):
        assert not got[name][:, 0, 0].any(), name
    gates, before = got.pop("gate"), clean.pop("gate")
    assert gates[:, 0, 0].isnan().all()
    assert torch.equal(gates[:, 0, 1:], before[:, 0, 1:])
    assert equal(got, clean)
    looked_at = differentiate(inputs, Cotangents(entropy=cotangents.entropy))
    assert looked_at["query"][:, 0, 0].isnan().all()
    assert looked_at["key"][:, 0, 0].isnan().all()
    assert not any(gradient[:, 0, -1].isnan().any() for gradient in looked_at.values())


@pytest.mark.parametrize("keys", [60, 1100])
def test_large_logits(keys, instruction_set, differentiate):
    """Of 1e4, and of rows that are finfo.min throughout, or but for some keys."""
    mask = torch.zeros(1, 1, 21, keys)
    mask[:, :, 1] = FINFO_MIN
    mask[:, :, 2, 1:] = FINFO_MIN
    mask[:, :, 3, ::2] = -math.inf
    mask[:, :, 3, 1::2] = FINFO_MIN
    mask[:, :, 4] = -math.inf
    inputs = make(keys=keys, attn_mask=mask)
    for size in (1.0, 2500.0):
        large = dataclasses.replace(inputs, query=size * inputs.query)
        cotangents = random_cotangents(large, 2)
        check(differentiate(large, cotangents), truth(large, cotangents))
    assert not differentiate(inputs, cotangents)["query"][..., 4, :].any()


@pytest.mark.parametrize("names", [("entropy",), ("output", "entropy", "logsumexp")], ids=str)
def test_probabilities_that_underflow(names, instruction_set, differentiate):
    """ln p of what is 0 in float32 is still a number, and 0 ln 0 is 0."""
    inputs = make(keys=600, scale=1.0)
    # logits of 0 and -300..-60,000, and one row whose keys all are alike
    inputs.query[..., 0], inputs.query[..., 1:] = 1.0, 0.0
    inputs.key[..., 0] = -100.0 * torch.arange(600) - 200.0
    inputs.query[:, :, 5] = 0.0
    cotangents = random_cotangents(inputs, 2, names)
    got = differentiate(inputs, cotangents)
    assert all(gradient.isfinite().all() for gradient in got.values())
    check(got, truth(inputs, cotangents))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_out_of_reach(dtype, instruction_set, differentiate):
    """What a type can't hold is infinite, or 0 if it is small; it isn't a NaN."""
    inputs = make(dtype=dtype)
    for size in (2.0**120, 2.0**-120) if dtype == torch.bfloat16 else (2.0**14, 2.0**-22):
        cotangents = Cotangents((size * torch.randn(1, 1, 2, 21, 16)).to(dtype))
        got = differentiate(inputs, cotangents)
        assert not any(gradient.isnan().any() for gradient in got.values())


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 2, 2, 5, 0, 8, 8), ALL),
        ((1, 2, 2, 0, 5, 8, 8), ALL),
        ((0, 2, 2, 5, 5, 8, 8), ALL),
        ((1, 2, 2, 5, 5, 8, 0), ALL),
        ((1, 2, 2, 5, 5, 0, 8), ALL),
        ((1, 0, 0, 5, 5, 8, 8), ALL),
        ((1, 2, 2, 5, 700, 8, 0), ("output",)),
    ],
    ids=str,
)
def test_nothing_to_sum(shape, names, instruction_set, differentiate):
    """Whatever is summed over nothing is 0, and written: a mask and edits that repeat aren't empty."""
    for mask in (lambda *sizes: torch.zeros(sizes), lambda *_: torch.zeros(1, 1, 1, 1)):
        edits = {name: getattr(EVERYTHING, name) for name in ("temperature", "key_bias", "key_scale", "fill")}
        case = Case("empty", shape, mask=mask, gate=lambda b, h: torch.rand(b, h), **edits)
        inputs = make_inputs(case, torch.float32)
        cotangents = random_cotangents(inputs, 2, names)
        check(differentiate(inputs, cotangents), truth(inputs, cotangents))


def _call(**changes):
    """A backward of a small call that is fine but for the changes."""
    mask = torch.randn(1, 2, 21, 60)
    edits = {"gate": torch.rand(1, 2), "fill": torch.randn(1, 1, 21, 16), "temperature": torch.ones(1, 2)}
    edits |= {name: torch.randn(1, 2, 60) for name in ("key_bias", "key_scale")}
    inputs = make(attn_mask=mask, **edits)
    cotangents = random_cotangents(inputs, 3)
    common, saved, constants = backward_arguments(inputs, cotangents)
    sizes = {
        "query": (21, 16),
        "key": (60, 16),
        "value": (60, 16),
        "attn_mask": (21, 60),
        "gate": (),
        "temperature": (),
    }
    sizes |= {"key_bias": (60,), "key_scale": (60,)}
    arguments = {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        **common,
        **saved,
        "grad_output": cotangents.output,
        "row_constants": constants,
        "grad_entropy": cotangents.entropy,
        "gradients": {name: torch.full((3, 1, 2, *size), POISON) for name, size in sizes.items()},
    }
    gradients = {**arguments["gradients"], **changes.pop("gradients", {})}
    arguments |= changes
    arguments["gradients"] = gradients
    try:
        cpu_library.attention_backward(**arguments)
    finally:
        written = {name: tensor for name, tensor in gradients.items() if bool((tensor != POISON).any())}
    return written


ones = torch.ones
IDS = torch.zeros(1, 1, 60)
REFUSED = [
    ({"key": ones(1, 2, 60, 15)}, "key: got shape"),
    ({"key": ones(1, 2, 60, 16).half()}, "key: got dtype"),
    ({"query": ones(1, 2, 21, 16).double()}, "query: got dtype"),
    ({"attention": ones(1, 2, 20, 16)}, "attention: got shape"),
    ({"attention": ones(1, 2, 21, 16).bfloat16()}, "attention: got dtype"),
    ({"row_max": ones(1, 2, 20)}, "row_max: got shape"),
    ({"log2_sum": ones(1, 2, 21).double()}, "log2_sum: got dtype"),
    ({"row_max": ones(1, 2, 42)[..., ::2]}, "row_max: got strides"),
    ({"row_max": None}, "a required pointer is null"),
    ({"log2_sum": None}, "a required pointer is null"),
    ({"row_max": None, "log2_sum": None}, "a required pointer is null"),
    ({"grad_output": ones(2, 1, 2, 21, 16)}, "grad_output: got shape"),
    ({"grad_output": ones(1, 2, 21, 16)}, "grad_output: got shape"),
    ({"grad_output": ones(3, 1, 2, 21, 16).half()}, "grad_output: got dtype"),
    ({"grad_output": ones(3, 1, 2, 21, 16, device="meta")}, "grad_output: got a torch.strided tensor on meta"),
    ({"row_constants": ones(3, 1, 2, 20)}, "row_constants: got shape"),
    ({"grad_entropy": ones(3, 1, 2, 21).bfloat16()}, "grad_entropy: got dtype"),
    ({"group_cotangents": [((2,), (IDS,), ones(3, 1, 2, 21, 2))]}, "groups: got dtype"),
    (
        {"group_cotangents": [((2,), (IDS.int(),), ones(3, 1, 2, 21, 3))]},
        "group_cotangents: got",
    ),
    ({"group_cotangents": 33 * [((1,), (IDS.int(),), ones(3, 1, 2, 21, 1))]}, "at most 32"),
    ({"gradients": {"query": ones(3, 1, 2, 21, 15)}}, r"gradients\['query'\]: got shape"),
    ({"gradients": {"query": ones(3, 1, 2, 21, 16).half()}}, r"gradients\['query'\]: got dtype"),
    ({"gradients": {"key": ones(2, 1, 2, 60, 16)}}, r"gradients\['key'\]: got shape"),
    ({"gradients": {"gate": ones(3, 1, 2).double()}}, r"gradients\['gate'\]: got dtype"),
    ({"gradients": {"key_bias": ones(3, 1, 1, 60)}}, r"gradients\['key_bias'\]: got shape"),
    (
        {"gradients": {"key_scale": ones(3, 60, 2, 1).permute(0, 3, 2, 1)}},
        r"gradients\['key_scale'\]: got strides",
    ),
    ({"gradients": {"attn_mask": ones(3, 1, 2, 21, 1)}}, r"gradients\['attn_mask'\]: got shape"),
    ({"gradients": {"colour": ones(3)}}, "gradients: got 'colour'"),
    ({"gate": None}, "gradients: got 'gate'"),
    ({"temperature": None}, "gradients: got 'temperature'"),
    ({"key_bias": None}, "gradients: got 'key_bias'"),
    ({"key_scale": None}, "gradients: got 'key_scale'"),
    ({"attn_mask": None}, "gradients: got 'attn_mask'"),
    ({"attn_mask": ones(1, 1, 21, 60, dtype=torch.bool)}, "gradients: got 'attn_mask' of a bool mask"),
    ({"attn_mask": ones(1, 1, 21, 61)}, "attn_mask"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_refuses_what_it_can_not_take(changes, message, library):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_a_call_that_is_fine(library):
    """So that what is refused above is refused for its change."""
    assert len(_call()) == 8


def test_what_is_wrong_is_found(library, differentiate):
    """A scale, a key and a head that are off by little."""
    inputs = make(heads=4, kv_heads=2, keys=600)
    cotangents = random_cotangents(inputs, 2)
    expected = truth(inputs, cotangents)
    steeper = dataclasses.replace(inputs, options={**inputs.options, "scale": 0.25 * (1 + 1e-4)})
    moved = inputs.key.clone()
    moved[:, :, -1] *= 1.01
    for wrong in (steeper, dataclasses.replace(inputs, key=moved)):
        got = differentiate(wrong, cotangents)
        assert all(worst(got[name], expected[name]) > 1.0 for name in ("query", "key", "value"))
