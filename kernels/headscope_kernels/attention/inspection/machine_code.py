"""Reading machine code: what a binary takes, and what its loop over full tiles issues and waits for."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

from headscope_kernels.attention.operands import assembly_of

# the first pattern that matches an opcode names its kind
KINDS = {
    "matrix": r"HGMMA|HMMA|UTC.MMA|WARPGROUP",
    "exp2": r"MUFU\.EX2",
    "maximum": r"FMNMX",
    "fma": r"FFMA",
    "add": r"FADD",
    "multiply": r"FMUL",
    "convert": r"F2FP|F2F|HADD2|PRMT",
    "spill": r"STL|LDL",
    "memory": r"LD|ST|CP|UTMA|SYNCS|DEPBAR|ARRIVES",
    "compare": r"FSETP|ISETP|FSEL|SEL|PLOP3|P2R|R2P",
    "address": r"U?IADD|U?IMAD|U?LEA|U?LOP3|U?SHF|U?MOV|R2UR|S2R|USEL|USETP|UISETP",
    "control": r"BRA|BAR|BSYNC|BSSY|NOP|SHFL|VOTE|WARPSYNC",
}


def figure(pattern: str, text: str) -> int:
    """The number that a pattern captures.

    Raises:
        ValueError: it isn't there.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output lacks {pattern}")
    return int(match[1])


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource usage line and the assembly of a binary, by the tools Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return usage, assembly_of(cubin)


def densest_matrix_loop(assembly: str) -> list[str]:
    """The instructions of the shortest innermost loop with matrix products: the one over full tiles."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*[^;]*)", line):
            code.append(instruction[1].strip())
            destination = re.search(r"`\((\.L_x_\d+)\)", code[-1])
            if destination and code[-1].startswith("BRA") and destination[1] in labels:
                loops.append((labels[destination[1]], len(code)))
    # waiting for a copy goes on behind the kernel's end, from where it jumps back
    loops = [(begin, end) for begin, end in loops if not any(_opcode(line) == "EXIT" for line in code[begin:end])]
    bodies = [(begin, end) for begin, end in loops if any("MMA" in _opcode(line) for line in code[begin:end])]
    if not bodies:
        # float32 products run on the FMA units
        bodies = [(begin, end) for begin, end in loops if any("FFMA" in _opcode(line) for line in code[begin:end])]
    innermost = [
        (begin, end)
        for begin, end in bodies
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in bodies)
    ]
    return min((code[begin:end] for begin, end in innermost), key=len, default=[])


def count_kinds(code: list[str]) -> Counter[str]:
    """Instructions by kind."""
    return Counter(next((kind for kind, pattern in KINDS.items() if re.match(pattern, line)), "other") for line in code)


def exponentials(code: list[str]) -> int:
    """Powers of two."""
    return sum(line.startswith("MUFU.EX2") for line in code)


def exponentials_under_products(loop: list[str]) -> int:
    """How many of a loop's powers of two are issued while a matrix product of Hopper's is in flight.

    A product ends a group (gsb0) that WARPGROUP.DEPBAR waits for until at most so many are left.
    """
    flying, under = 0, 0
    for turn in range(2):
        for line in loop:
            if line.startswith("HGMMA"):
                flying += "gsb0" in line
            elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", line):
                flying = min(flying, int(wait[1], 16))
            elif line.startswith("MUFU.EX2") and flying:
                # what the first turn leaves in flight belongs to the second
                under += turn
    return under


def _opcode(line: str) -> str:
    return line.split()[0]
