"""The kernel's own arithmetic: 2^x, conversions between float types, and what the library says about itself."""

import math
import os
import struct
import subprocess
import sys

import pytest
import torch

from headscope.ops import cpu_library, cpu_structs


def exp2(library, values):
    result = torch.empty_like(values)
    code = cpu_library.INSTRUCTION_SETS[library.instruction_set]
    assert library.functions.headscope_exp2(values.data_ptr(), result.data_ptr(), len(values), code) == 0
    return result


def test_exp2(instruction_set, library):
    """Relative error below 2^-23; exact at 0, and 0 below -126."""
    torch.manual_seed(0)
    ranges = [torch.linspace(-126, 0, 1_000_003), -torch.rand(1_000_000), -(2.0 ** torch.linspace(-40, 6.9, 100_000))]
    values = torch.cat(ranges)
    expected = values.double().exp2()
    error = ((exp2(library, values) - expected) / expected).abs().max()
    assert error < 2.0**-23
    special = torch.tensor([0.0, -0.0, -126.0, -126.0001, -127.5, -200.0, -3.4e38, -math.inf, math.nan])
    result = exp2(library, special)
    assert result[:3].tolist() == [1.0, 1.0, 2.0**-126]
    assert result[3:8].tolist() == [0.0] * 5
    assert result[8].isnan()
    # every integer, exactly, and NaN with any payload and sign
    assert torch.equal(exp2(library, -torch.arange(127.0)), torch.exp2(-torch.arange(127.0)))
    bits = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    assert exp2(library, bits.view(torch.float32)).isnan().all()


def _through(fills, dtype):
    """Values through the kernel: as fills they are converted to float32 and stored in the output's type."""
    count = fills.numel()
    query = torch.zeros(1, 1, 1, 1, dtype=dtype)
    value = torch.zeros(1, 1, 1, count, dtype=dtype)
    output = torch.zeros(1, 1, 1, count, dtype=dtype)
    cpu_library.attention_forward(
        query,
        query,
        value,
        attn_mask=None,
        is_causal=False,
        scale=1.0,
        gate=torch.zeros(1, 1),
        fill=fills.reshape(1, 1, 1, count),
        statistics=(),
        output=output,
        statistic_outputs=[],
    )
    return output.flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_low_precision_number_survives(dtype, instruction_set, library):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for start in range(0, len(values), 8192):
        part = values[start : start + 8192]
        result = _through(part, dtype)
        assert torch.equal(result.isnan(), part.isnan())
        kept = ~part.isnan()
        assert torch.equal(result[kept].view(torch.int16), part[kept].view(torch.int16))
        widened = _through(part, torch.float32)
        assert torch.equal(widened.nan_to_num(7.0), part.float().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stores_round_to_nearest_even(dtype, instruction_set, library):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (8000,), dtype=torch.int64).to(torch.int32)
    halfway = torch.arange(-(2**15), 2**15, 97, dtype=torch.int16).view(dtype).float().view(torch.int32)
    ties = torch.cat([halfway + (1 << 15), halfway + (1 << 12), halfway + (1 << 12) - 1, halfway + (1 << 15) + 1])
    edges = [65504.0, 65519.996, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 3.4e38, 1e-45, -0.0]
    for values in (bits.view(torch.float32), torch.randn(8000), ties.view(torch.float32)[:8000], torch.tensor(edges)):
        result, expected = _through(values, dtype), values.to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(result[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_what_the_library_says(library):
    info = cpu_library.build_info()
    assert info["abi_version"] == cpu_library.ABI_VERSION
    assert info["instruction_set"] in cpu_library.INSTRUCTION_SETS
    assert info["path"] == cpu_library.library_path()
    assert cpu_library.unavailable_reason() is None
    messages = {library.functions.headscope_status_message(code) for code in range(10)}
    assert len(messages) == 10


def test_threads_come_from_the_runtime_that_torch_loaded(library):
    """Two OpenMP runtimes in a process would compete for the cores."""
    if not sys.platform.startswith("linux") or library.functions.headscope_threading() != b"OpenMP":
        pytest.skip("needs Linux and a build with OpenMP")
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(loaded) == 1


def test_the_environment_chooses_the_instruction_set(library):
    def info(requested):
        code = (
            "from headscope.ops import cpu_library as c;"
            " print(c.unavailable_reason() or c.build_info()['instruction_set'])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HEADSCOPE_CPU_INSTRUCTIONS": requested},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        return result.stdout.strip()

    assert info("baseline") == "baseline"
    assert "expected one of best" in info("sse9")


def test_null_and_nonsense_are_refused(library):
    forward = library.functions.headscope_attention_forward

    def status(*sizes, words=None, statistics=b""):
        call = [0] * (cpu_structs.ATTENTION.size // 8)
        call[: len(sizes)] = sizes
        for position, value in (words or {}).items():
            call[position] = value
        return forward(struct.pack(f"{len(call)}q", *call) + statistics)

    # the dtypes of query, fill, and the last two words: the instruction set and the number of statistics
    query_dtype, instructions, count = 12, -2, -1
    statistic = cpu_structs.STATISTIC.size // 8 * [0]
    assert forward(None) == 1
    assert status(-1) == 2
    assert status(1, 3, 2, 1, 1, 1, 1) == 3
    assert status(1, 1, 1, 1, 1, 1, 1) == 1
    assert status(1, 1, 1, 1, 1, 1, 1, words={query_dtype: 9}) == 4
    assert status(1, 1, 1, 1, 1, 9000, 1) == 5
    assert status(1, 1, 1, 0, 1, 1, 1, words={instructions: 9}) == 7
    assert status(1, 1, 1, 0, 1, 1, 1, words={count: 33}) == 8
    for kind, sizes in ((9, ()), (-1, ()), (5, (1, 1, 0, 1)), (6, (-1,)), (6, (65537,)), (7, (1, -1))):
        statistic[0], statistic[2 : 2 + len(sizes)] = kind, sizes
        packed = struct.pack(f"{len(statistic)}q", *statistic)
        assert status(1, 1, 1, 0, 1, 1, 1, words={count: 1}, statistics=packed) == 8


def test_the_packing_matches_the_header():
    """Sizes as the header lays them out, every field eight bytes wide."""
    tensor, edit, stack = 1 + 4 + 1, 1 + 3, 1 + 5 + 1
    # the attention among the tensors; row_max and log2_sum before the five numbers at the end
    assert cpu_structs.ATTENTION.size == 8 * (7 + 7 * tensor + 4 * edit + 2 + 5)
    assert cpu_structs.STATISTIC.size == 8 * (1 + 1 + 4 + 1 + 3)
    assert cpu_structs.GRADIENTS.size == 8 * (1 + stack + 2 + 3 * stack + 5 + 4 + 1)
    assert cpu_structs.GROUP_COTANGENT.size == 8 * (1 + 2 + 1 + 3)
