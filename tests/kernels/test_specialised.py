"""The forward as Triton specialises it for Hopper: its numbers, what it refuses, and that it is specialised."""

import contextvars
from types import SimpleNamespace

import pytest
import torch
import triton

from compiled import answers
from forward_problem import DEVICE, attention, group_ids, normal
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.hopper.schedules import unserved
from headscope_kernels.attention.hopper.specialised import SpecialisedKernel

CONFIGURATION = ForwardConfiguration(128, 128, num_warps=4, descriptors=True, schedule="specialised")
STATISTICS_SERVED = ("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy")

hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper or the interpreter"
)


@hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 80, 128])
def test_head_dimensions(dim: int, dtype: torch.dtype):
    attention(heads=1, queries=130, keys=256, dim=dim, dtype=dtype).check(("entropy",), CONFIGURATION)


@hopper
@pytest.mark.parametrize("queries", [1, 100, 128])
def test_everything_it_serves(queries: int):
    problem = attention(batch=2, heads=4, kv_heads=2, queries=queries, keys=256, dim=16, dtype=torch.float16)
    problem.gate = torch.tensor([[1.0, 0.0, 0.5, 1.0]], device=DEVICE)
    problem.fill, problem.temperature = normal(4, queries, 16), normal(2, 4).exp()
    problem.check(STATISTICS_SERVED, CONFIGURATION)
    saved = {name: torch.empty(problem.rows, device=DEVICE) for name in ("row_max", "log2_sum")}
    before_gate = torch.empty_like(problem.query)
    problem.run((), CONFIGURATION, attention=before_gate, **saved)
    problem.gate = None
    problem.check_output(before_gate)
    natural = saved["row_max"] + saved["log2_sum"] * torch.tensor(2.0).log().item()
    problem.check_statistic("logsumexp", natural)


@hopper
def test_padded_instead_of_split():
    whole = ForwardConfiguration(128, 128, 4, 2, (64,), (64,), descriptors=True, schedule="specialised")
    attention(heads=1, queries=20, keys=128, dim=40, dtype=torch.float16).check(("entropy",), whole)


@hopper
def test_strided_tokens():
    """Tokens before heads, as a projection leaves them."""
    problem = attention(batch=2, heads=3, queries=130, keys=128, dim=40, dtype=torch.float16)
    for name in ("query", "key", "value"):
        setattr(problem, name, getattr(problem, name).transpose(1, 2).contiguous().transpose(1, 2))
    problem.check(("entropy",), CONFIGURATION)


def refused(problem, statistics: tuple[str, ...] = ("entropy",), configuration=CONFIGURATION) -> str:
    with pytest.raises(ValueError, match=r"^schedule 'specialised' can't serve ") as caught:
        problem.run(statistics, configuration)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(1, 1, 1, 128, dtype=torch.bool)}, "mask (the warps that compute"),
        ({"is_causal": True}, "is_causal (tiles across the diagonal"),
        ({"key_bias": torch.zeros(1, 1, 128)}, "key_bias (a row can't"),
        ({"key_scale": torch.ones(1, 1, 128)}, "key_scale (a row can't"),
        ({"scale": -1.0}, "scale <= 0 (the query would have to change"),
        ({"scale": 0.0}, "scale <= 0 (the query would have to change"),
    ],
)
def test_refused_calls(change: dict, message: str):
    problem = attention(queries=20, keys=128, dtype=torch.float16)
    for name, value in change.items():
        setattr(problem, name, value.to(DEVICE) if isinstance(value, torch.Tensor) else value)
    assert message in refused(problem)


@pytest.mark.parametrize("name", ["distance", "group_mass", "group_entropy"])
def test_refused_statistics(name: str):
    """A distance would count from a wrong row: see SpecialisedKernel's module."""
    problem = attention(queries=20, keys=128, dtype=torch.float16)
    problem.groups = group_ids(1, 1, 128)
    assert "another statistic (not known" in refused(problem, ("entropy", name))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"keys": 100}, "100 keys, expected a multiple of 128"),
        ({"keys": 0}, "0 keys, expected a multiple of 128"),
        ({"dim": 160}, "head dimensions 160 and 160, expected 1 to 128"),
        ({"dtype": torch.float32}, "torch.float32, expected float16 or bfloat16"),
        ({"dim": 20}, "unaligned key (descriptors need"),
    ],
)
def test_refused_shapes(shape: dict, message: str):
    assert message in refused(attention(**{"queries": 20, "keys": 128, "dtype": torch.float16, **shape}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_refused_strides(name: str):
    problem = attention(queries=20, keys=128, dtype=torch.float16)
    setattr(problem, name, getattr(problem, name)[:, :1].expand(-1, 2, -1, -1))
    assert f"unaligned {name} (descriptors need" in refused(problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_warps": 8}, "a tile of 128 x 128, 8 warps, expected (128,) queries and (4,) warps"),
        ({"block_queries": 64}, "a tile of 64 x 128, 4 warps"),
        ({"descriptors": False}, "descriptors=False, expected True"),
        ({"dim_widths": (16, 16, 16)}, "three chunks of a head dimension"),
    ],
)
def test_refused_configurations(change: dict, message: str):
    own = {"block_queries": 128, "block_keys": 128, "descriptors": True, "schedule": "specialised", **change}
    problem = attention(queries=20, keys=128, dtype=torch.float16)
    assert message in refused(problem, configuration=ForwardConfiguration(**own))


def test_refused_targets():
    problem = unserved(CONFIGURATION, torch.float16, 64, 64, 128, ("cuda", 100))
    assert problem == "schedule 'specialised' can't serve target ('cuda', 100), expected ('cuda', 90)"


class Kernel:
    """A jit function, and the binary it returns, that only say what memory a launch would find."""

    name = "kernel"

    def __init__(self, warps: int) -> None:
        self.metadata = SimpleNamespace(num_warps=warps)
        self.found: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(returned: bool):
            from triton.runtime._allocation import _allocator

            self.found.append(_allocator.get()(256, 128, None).numel())
            return self if returned else None

        return launch


def test_launches_find_memory(monkeypatch):
    """The first launch and, from the binary, later ones; the caller's allocator stays what it was."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **kwargs: empty(*shape, **kwargs))
    theirs = []

    def caller():
        triton.set_allocator(lambda size, alignment, stream: theirs.append(size) or empty(1))
        kernel = Kernel(12)
        binary = SpecialisedKernel(kernel)[(1,)](True)
        assert binary[(1,)](False) is None
        assert kernel.found == [256, 256]
        assert not theirs
        Kernel(12)[(1,)](True)
        assert theirs == [256]

    contextvars.copy_context().run(caller)


def test_a_binary_that_is_not_specialised_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.zeros(*shape))
    with pytest.raises(RuntimeError, match="did not specialise kernel: it has 4 warps, expected 12"):
        SpecialisedKernel(Kernel(4))[(1,)](True)


SCRIPT = """
import json, re, sys, torch, triton
from headscope_kernels.attention.inspection import forward as static_report
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.inspection.forward import Problem, report
from headscope_kernels.attention.inspection.compiling import TARGETS

made = []
compile = triton.compile
triton.compile = lambda *args, **kwargs: made.append(compile(*args, **kwargs)) or made[-1]
own = ForwardConfiguration(128, 128, num_warps=4, descriptors=True, schedule="specialised")
for line in sys.stdin:
    entry = json.loads(line)
    entry["statistics"] = tuple(entry["statistics"])
    result = report(Problem(dtype=torch.float16, configuration=own, **entry), "sm_90")
    text = made[-1].asm["ttgir"]
    copies = re.findall(r"async_tma_copy_global_to_local %(\\w+)\\[%(\\w+),[^\\n]*?-> !ttg.memdesc<([0-9x]+)x", text)
    expected = re.findall(r"barrier_expect %\\w+, (\\d+)", text)
    print(json.dumps({
        "spill_bytes": result.spill_bytes,
        "shared_bytes": result.shared_bytes,
        "per_score": result.instructions_per_score,
        "misplaced": result.misplaced,
        "boxes": re.findall(r"tensordesc<tensor<([0-9x]+)x[a-z]", "".join(
            line for line in text.splitlines() if "async_tma_copy" in line)),
        "tiles": [shape for _, _, shape in copies],
        "expected": list(map(int, expected)),
    }), flush=True)
"""
PROBLEMS = [{"dim": dim, "statistics": names} for dim in (40, 64, 80, 128) for names in ([], ["entropy"])] + [
    {"dim": 64, "statistics": list(STATISTICS_SERVED), "fill": True, "temperature": True, "saved": True},
    {"dim": 64, "statistics": ["entropy"], "output": False, "gate": False},
]


def elements(shape: str) -> int:
    return torch.Size(map(int, shape.split("x"))).numel()


@pytest.mark.full
def test_compiled():
    """Specialised, without spills, with operands in their places, and each box of a copy as large as its tile.

    A descriptor of the launcher's keeps its box where Triton cuts the tile in two: it would fetch too much, and a
    barrier would count other bytes than come.
    """
    for problem, result in zip(PROBLEMS, answers(SCRIPT, PROBLEMS), strict=True):
        assert result["spill_bytes"] == 0, problem
        assert result["misplaced"] == [], problem
        assert result["shared_bytes"] <= 227 * 1024
        assert result["per_score"] <= 9.7, problem
        # each chunk: the query's twice, then the key's and the value's
        chunks = 2 if problem["dim"] in (40, 80) else 1
        assert len(result["tiles"]) == chunks * (4 if problem.get("output", True) else 3), problem
        assert [elements(box) for box in result["boxes"]] == [elements(tile) for tile in result["tiles"]], problem
        assert result["expected"] == [2 * elements(tile) for tile in result["tiles"]], problem
