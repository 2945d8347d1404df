"""Matrix products of compiled kernels read their operands from where PTX says."""

from types import SimpleNamespace

import pytest

from compiled import answers
from headscope_kernels.attention import operands
from headscope_kernels.attention.operands import misplaced_operands, refuse_misplaced

# a product whose left operand is in registers, its right one at 0x4000 behind the base: (0x4400 >> 4) = 0x440
PTX = """
    mov.b32 %r1, global_smem;
    add.s32 %r2, %r1, 16384;
    bfe.u32 %r3, %r2, 4, 14;
    cvt.u64.u32 %rd1, %r3;
    add.s64 %rd2, %rd1, -4611685949707911136;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r9,%r10}, {%r5,%r6}, %rd2, 0, 1, 1, 1;
"""
START = """
    UMOV UR20, 0x400 ;
    S2UR UR6, SR_CgaCtaId ;
    ULEA UR20, UR6, UR20, 0x18 ;
    UIADD3 UR4, UR20, 0x4000, URZ ;
    USHF.R.U32.HI UR6, URZ, 0x4, UR4 ;
    USGXT.U32 UR6, UR6, 0xe ;
    UMOV UR39, URZ ;
"""
PRODUCT = """
    UIADD3.X UR39, UR39, -0x3ffffff0, URZ, UP1, !UPT ;
    HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR36].tnspB, R24 ;
"""


def test_right_places_pass():
    assert misplaced_operands(PTX, START + "UIADD3 UR38, UP1, UR6, 0x20, URZ ;" + PRODUCT) == []


def test_a_register_that_nothing_wrote():
    problems = misplaced_operands(PTX, START + "UIADD3 UR38, UP1, UR38, 0x20, URZ ;" + PRODUCT)
    assert problems == ["a descriptor is computed from UR38, which nothing has written"]


def test_a_register_that_holds_something_else():
    stale = START + "UMOV UR38, 0xc40 ;\n UIADD3 UR38, UP1, UR38, 0x20, URZ ;" + PRODUCT
    problems = misplaced_operands(PTX, stale)
    assert problems == ["product 0 reads its right operand by 0xc000001000000c60, expected 0xc000001000000460"]


def test_a_register_that_was_overwritten_on_the_way():
    kept = START + "UIADD3 UR38, UP1, UR6, 0x20, URZ ;\n MOV R7, UR38 ;\n UMOV UR38, 0x1 ;\n"
    assert len(misplaced_operands(PTX, kept + PRODUCT)) == 1
    assert misplaced_operands(PTX, kept + "R2UR UR38, R7 ;" + PRODUCT) == []


def test_what_cant_be_followed_isnt_judged():
    loaded = START + "ULDC UR38, c[0x0][0x2e0] ;" + PRODUCT
    assert misplaced_operands(PTX, loaded) == []
    assert misplaced_operands(PTX, PRODUCT + PRODUCT)[0].startswith("a descriptor")


def test_groups_of_warps_in_another_order():
    """Each group's products read another place; the assembler may put the second group first."""
    other = PTX.replace("16384", "32768").replace("%r", "%s")
    ptx = "setmaxnreg.inc.sync.aligned.u32 232;" + PTX + "setmaxnreg.inc.sync.aligned.u32 232;" + other
    group = "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;" + START + "UIADD3 UR38, UP1, UR6, 0x20, URZ ;" + PRODUCT
    far = group.replace("0x4000", "0x8000")
    assert misplaced_operands(ptx, group + far) == []
    assert misplaced_operands(ptx, far + group) == []
    assert len(misplaced_operands(ptx, group + group)) == 1


@pytest.fixture
def binary(monkeypatch, tmp_path):
    """What a launch returns of a kernel, assembled as the test says, and how often it was looked at."""
    looks = []

    def of(assembly: str, architecture: int = 90, name: str = "kernel") -> SimpleNamespace:
        monkeypatch.setattr(operands, "assembly_of", lambda cubin: looks.append(name) or assembly)
        target = SimpleNamespace(backend="cuda", arch=architecture)
        asm = {"ptx": PTX, "cubin": name.encode()}
        return SimpleNamespace(hash=name, name=name, asm=asm, metadata=SimpleNamespace(target=target))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(operands, "_looked_at", set())
    return of, looks


def test_a_wrong_binary_is_refused_every_time(binary):
    of, looks = binary
    wrong = of(START + "UIADD3 UR38, UP1, UR38, 0x20, URZ ;" + PRODUCT)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^kernel was assembled wrongly by .*UR38, which nothing has written"):
            refuse_misplaced(wrong)
    assert len(looks) == 2
    # other chips have other products
    refuse_misplaced(of("", architecture=80, name="other"))
    refuse_misplaced(None)
    assert len(looks) == 2


def test_a_sound_binary_is_looked_at_once(binary, monkeypatch):
    of, looks = binary
    sound = of(START + "UIADD3 UR38, UP1, UR6, 0x20, URZ ;" + PRODUCT)
    for _ in range(2):
        refuse_misplaced(sound)
    # another process
    monkeypatch.setattr(operands, "_looked_at", set())
    refuse_misplaced(sound)
    assert looks == ["kernel"]


def test_without_the_tool_there_is_a_warning(binary, monkeypatch):
    of, _ = binary
    sound = of("")

    def missing(cubin: bytes) -> str:
        raise FileNotFoundError("nvdisasm")

    monkeypatch.setattr(operands, "assembly_of", missing)
    with pytest.warns(UserWarning, match="kernel can't be checked for misplaced operands: nvdisasm"):
        refuse_misplaced(sound)


SCRIPT = """
import json, sys, torch
from headscope_kernels.attention.inspection.compiling import DTYPES
from headscope_kernels.attention.inspection.forward import Problem, report
for line in sys.stdin:
    entry = json.loads(line)
    entry["dtype"] = DTYPES[entry["dtype"]]
    entry["statistics"] = tuple(entry["statistics"])
    print(json.dumps(report(Problem(**entry), "sm_90").misplaced), flush=True)
"""
EVERY_STATISTIC = ["entropy", "logsumexp", "collision_entropy", "distance", "group_mass", "group_entropy"]
EDITS = {"fill": True, "temperature": True, "key_bias": True, "key_scale": True}
# what gave wrong sums or illegal addresses on an H200 while borders were not pipelined, and its neighbours
PROBLEMS = [
    *(
        {"dim": dim, "statistics": [name], "groups": 3}
        for dim in (40, 64, 80)
        for name in ("group_mass", "group_entropy")
    ),
    *({"dim": dim, "statistics": ["group_mass"], "groups": 3, "causal": True} for dim in (40, 64)),
    {
        "dim": 24,
        "dim_v": 20,
        "statistics": EVERY_STATISTIC,
        "groups": 4,
        "queries": 35,
        "keys": 45,
        "mask": "bool",
        **EDITS,
    },
    {"dim": 64, "statistics": EVERY_STATISTIC, "groups": 4, "causal": True, "saved": True},
    {"dim": 128, "statistics": EVERY_STATISTIC, "groups": 4, "queries": 300, "keys": 300},
    {"dim": 96, "statistics": ["group_mass"], "groups": 77},
    *({"dim": dim, "statistics": ["entropy"]} for dim in (40, 64, 80, 128, 160)),
    {"dim": 64, "statistics": ["entropy"], "mask": "additive", **EDITS},
]


def misplaced(problems: list[dict]) -> list[list[str]]:
    return answers(SCRIPT, problems)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forward_kernels_for_hopper(dtype):
    found = misplaced([{**problem, "dtype": dtype} for problem in PROBLEMS])
    assert len(found) == len(PROBLEMS)
    wrong = [(problem, lines[:2]) for problem, lines in zip(PROBLEMS, found, strict=True) if lines]
    assert not wrong
