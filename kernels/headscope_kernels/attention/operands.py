"""A check that the matrix products of a compiled kernel read their operands from where the kernel put them.

On Hopper a matrix product (PTX `wgmma`, machine code `HGMMA`) finds an operand in shared memory by a descriptor of 64
bits, which the assembler keeps in uniform registers. The assembler of CUDA 12.8, which Triton 3.6 and 3.7 ship, loses
some of them: where two buffers share an address one after the other and differ in their swizzle, it computes
descriptors of the second from a register that holds something else, or nothing yet. On an H200 such kernels gave wrong
group sums and illegal addresses. It shows without a GPU: PTX says what a descriptor is, and following the uniform
registers through the machine code says what it became.

What isn't a constant in PTX (the stages of a pipeline) or can't be followed (registers that were spilled into
vectors) is not judged.
"""

import hashlib
import re
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from itertools import chain, permutations
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.runtime.cache import get_cache_manager

# where shared memory begins in machine code; any address does, as long as both sides have the same
_SHARED_BASE = 0x400
_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1


# a change of what is looked for looks again
_VERSION = b"1"
_SOUND = "operands_are_sound"
_looked_at: set[str] = set()


def refuse_misplaced(compiled: Any) -> None:
    """Looks at a binary for Hopper once; what it found sound, Triton's own cache remembers.

    Args:
        compiled: what a launch of a jit function returns; None under the interpreter.

    Raises:
        RuntimeError: matrix products of it read their operands from elsewhere: its numbers would be wrong.
    """
    if compiled is None or compiled.hash in _looked_at:
        return
    target = compiled.metadata.target
    if target.backend == "cuda" and int(target.arch) == 90:
        cubin = compiled.asm["cubin"]
        cache = get_cache_manager(hashlib.sha256(_VERSION + cubin).hexdigest())
        if cache.get_file(_SOUND) is None:
            try:
                problems = misplaced_operands(compiled.asm["ptx"], assembly_of(cubin))
            except OSError as error:
                warnings.warn(f"{compiled.name} can't be checked for misplaced operands: {error}", stacklevel=2)
                return
            if problems:
                raise RuntimeError(
                    f"{compiled.name} was assembled wrongly by {triton.knobs.nvidia.ptxas.path}"
                    f" ({triton.knobs.nvidia.ptxas.version}), its numbers would be wrong: {problems[0]}, and"
                    f" {len(problems) - 1} more. Set TRITON_PTXAS_PATH to that of CUDA 13, or use another backend"
                )
            cache.put(b"", _SOUND)
    _looked_at.add(compiled.hash)


def assembly_of(cubin: bytes) -> str:
    """A binary's machine code as text, by the tool that Triton ships.

    Raises:
        OSError: the tool isn't there, or can't read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise OSError(f"nvdisasm: {run.stderr.strip()[-200:]}")
    return run.stdout


class Product(NamedTuple):
    """One matrix product's descriptors; None where an operand is in registers or unknown."""

    left: int | None
    right: int | None


class _Undefined(Exception):
    """A register is read that nothing has written."""


def misplaced_operands(ptx: str, assembly: str) -> list[str]:
    """The faults of the operands' places, a sentence each; empty if there are none.

    Args:
        ptx: the kernel as Triton hands it to the assembler.
        assembly: the same as `nvdisasm -c` prints it.
    """
    expected, (found, undefined) = _wanted(ptx), _followed(assembly)
    problems = [f"a descriptor is computed from {name}, which nothing has written" for name in undefined]
    # groups of warps with work of their own may come in another order than in PTX
    orders = [order for order in permutations(expected) if list(map(len, order)) == list(map(len, found))]
    # the assembler unrolled or merged loops, so that products can't be told apart, if there are none
    return problems + min((_differences(order, found) for order in orders), key=len, default=[])


def _differences(expected: Sequence[Sequence[Product]], found: Sequence[Sequence[Product]]) -> list[str]:
    problems = []
    pairs = zip(chain.from_iterable(expected), chain.from_iterable(found), strict=True)
    for number, (wanted, got) in enumerate(pairs):
        for side, should, is_ in (("left", wanted.left, got.left), ("right", wanted.right, got.right)):
            if should is not None and is_ is not None and should != is_:
                problems.append(f"product {number} reads its {side} operand by {is_:#x}, expected {should:#x}")
    return problems


def _wanted(ptx: str) -> list[list[Product]]:
    """The descriptors of every product in order, where they are constants, by groups of warps with work of their own.

    Such a group asks for its number of registers first.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    written: dict[str, int] = {}
    for line in lines:
        if match := re.match(r"(?:@\S+\s+)?[a-z0-9_.:]+\s+(%\w+),", line):
            written[match[1]] = written.get(match[1], 0) + 1
    values: dict[str, int] = {"global_smem": _SHARED_BASE}
    groups: list[list[Product]] = [[]]
    for line in lines:
        if line.startswith("setmaxnreg"):
            groups.append([])
        elif line.startswith("wgmma.mma_async"):
            operands = re.sub(r"\{[^}]*\}", "registers", line[line.index("}") + 1 :]).strip(" ,;").split(",")
            groups[-1].append(Product(*(values.get(operand.strip()) for operand in operands[:2])))
        match = re.match(r"([a-z0-9_.:]+)\s+(%\w+),\s*(.*);$", line)
        # what is written twice is a loop's
        if match is None or written[match[2]] > 1:
            continue
        result = _of_ptx(match[1], [_number(part.strip(), values) for part in match[3].split(",")])
        if result is not None:
            values[match[2]] = result
    return [products for products in groups if products]


def _number(text: str, values: dict[str, int]) -> int | None:
    if text in values:
        return values[text]
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|[0-9]+)", text) else None


def _of_ptx(operation: str, values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    name, *kind = operation.split(".")
    mask = _ALL if "64" in (kind[0] if kind else "") or name == "cvt" else _LOW
    match name, known:
        case (("mov" | "cvt"), [value]):
            return value & mask
        case "add", [left, right]:
            return (left + right) & mask
        case "or", [left, right]:
            return (left | right) & mask
        case "and", [left, right]:
            return (left & right) & mask
        case "shr", [left, right]:
            return (left & mask) >> right
        case "shl", [left, right]:
            return (left << right) & mask
        case "bfe", [value, first, count]:
            return (value >> first) & ((1 << count) - 1)
    return None


class _Registers:
    """Uniform registers, predicates of theirs, and the vector registers that only carry one of them."""

    def __init__(self) -> None:
        self.values: dict[str, int | None] = {"URZ": 0, "RZ": 0, "UPT": 1, "!UPT": 0}
        self.undefined: list[str] = []

    def read(self, text: str) -> int | None:
        text = text.strip().replace(".reuse", "")
        if text.startswith("-") and not text.startswith("-0x"):
            value = self.read(text[1:])
            return None if value is None else -value & _LOW
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            return int(text, 0) & _LOW
        if re.fullmatch(r"UR\d+", text) and text not in self.values:
            raise _Undefined(text)
        return self.values.get(text)

    def pair(self, text: str) -> int | None:
        """Of two neighbouring registers."""
        text = text.strip()
        if text.startswith("-UR"):
            value = self.pair(text[1:])
            return None if value is None else -value & _ALL
        if not re.fullmatch(r"UR\d+", text):
            return 0 if text == "URZ" else int(text, 0) & _ALL if re.match(r"-?0x|\d", text) else None
        low, high = self.read(text), self.read(f"UR{int(text[2:]) + 1}")
        return None if low is None or high is None else low | high << 32

    def write(self, name: str, value: int | None, count: int = 1) -> None:
        kind = name.rstrip("0123456789")
        if name in ("URZ", "RZ"):
            return
        for index in range(count):
            part = None if value is None else (value >> (32 * index)) & _LOW
            self.values[f"{kind}{int(name[len(kind) :]) + index}"] = part


def _followed(assembly: str) -> tuple[list[list[Product]], list[str]]:
    """The descriptors that every product reads, grouped as in PTX, and the registers read before they are written.

    In the order of the text, each loop once: a descriptor that is a constant is right on the first round or never.
    """
    registers, undefined = _Registers(), []
    groups: list[list[Product]] = [[]]
    for line in assembly.splitlines():
        line = re.sub(r"/\*[0-9a-f]*\*/", "", line).strip().rstrip(";").strip(" {}")
        match = re.match(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*)", line)
        if match is None:
            continue
        conditional, operation, rest = bool(match[1]), match[2], match[3]
        operands = [operand.strip() for operand in rest.split(",")] if rest else []
        try:
            if operation.startswith("USETMAXREG"):
                groups.append([])
            elif operation.startswith("HGMMA"):
                groups[-1].append(_product(registers, operands, rest))
            elif operands and re.fullmatch(r"UR(\d+|Z)", operands[0]):
                _uniform(registers, operation, operands, conditional)
            elif operands and re.fullmatch(r"R\d+", operands[0]):
                _vector(registers, operation, operands, conditional)
        except _Undefined as error:
            name = str(error)
            undefined.append(name)
            registers.write(name, None)
            if operation.startswith("HGMMA"):
                groups[-1].append(Product(None, None))
            else:
                registers.write(operands[0], None, _width(operation))
    return [products for products in groups if products], undefined


def _product(registers: _Registers, operands: list[str], rest: str) -> Product:
    first = int(re.findall(r"gdesc\[UR(\d+)\]", rest)[0])
    in_registers = re.fullmatch(r"R\d+(\.reuse)?", operands[1]) is not None
    left = None if in_registers else registers.pair(f"UR{first}")
    return Product(left, registers.pair(f"UR{first + 2}"))


def _width(operation: str) -> int:
    """How many registers the operation writes."""
    return 4 if ".128" in operation else 2 if re.search(r"\.64|WIDE|^CS2R", operation) else 1


def _vector(registers: _Registers, operation: str, operands: list[str], conditional: bool) -> None:
    if operation.startswith(("ST", "RED", "ATOM")):
        return
    value = None
    if operation == "MOV":
        value = registers.read(operands[1])
    elif operation == "IMAD.MOV.U32" or (operation == "IMAD.U32" and operands[1:3] == ["RZ", "RZ"]):
        value = registers.read(operands[3])
    width = _width(operation)
    registers.write(operands[0], None, width)
    registers.write(operands[0], None if conditional else value)


def _uniform(registers: _Registers, operation: str, operands: list[str], conditional: bool) -> None:
    target, sources = operands[0], operands[1:]
    carry = sources.pop(0) if sources and re.fullmatch(r"UP\d|UPT", sources[0]) else None
    carries = [source for source in sources if re.fullmatch(r"!?UP\w+", source)]
    numbers = [source for source in sources if source not in carries]
    value, width = None, _width(operation)
    name = operation.split(".")[0]
    if operation == "UIADD3.64":
        parts = [registers.pair(source) for source in numbers]
        known = [part for part in parts if part is not None]
        value = sum(known) & _ALL if len(known) == len(parts) else None
    elif name in ("UIADD3", "UMOV", "USHF", "USGXT", "ULOP3", "ULEA", "R2UR", "S2UR"):
        value = _of_machine(registers, operation, numbers, carries if operation.endswith(".X") else [])
        if carry is not None and name == "UIADD3":
            registers.values[carry] = None if value is None else int(value > _LOW)
        value = None if value is None else value & _LOW
    registers.write(target, None if conditional else value, width)


def _of_machine(registers: _Registers, operation: str, sources: list[str], carries: list[str]) -> int | None:
    """A sum keeps its carry above 32 bits; None for what isn't understood."""
    if operation.startswith("S2UR"):
        # the first program of a cluster
        return 0 if "CgaCtaId" in sources[0] else None
    table = int(sources.pop(3), 0) if operation == "ULOP3.LUT" and len(sources) > 3 else None
    values = [registers.read(source) for source in sources] + [registers.values.get(carry) for carry in carries]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    match operation.split("."), known:
        case ["UMOV" | "R2UR", *_], [value, *_]:
            return value
        case ["UIADD3", *_], _:
            return sum(known)
        case ["USHF", "R", "U32", "HI"], [_, count, value]:
            return value >> count
        case ["USHF", "L", "U32", *_], [value, count, _]:
            return (value << count) & _LOW
        case ["USGXT", "U32"], [value, count]:
            return value & ((1 << count) - 1)
        case ["ULOP3", "LUT"], [left, right, *_]:
            return {0xC0: left & right, 0xFC: left | right, 0x3C: left ^ right}.get(table)  # pyright: ignore
        case ["ULEA"], [left, right, count]:
            return ((left << count) + right) & _LOW
        case ["ULEA", "HI"], [left, right, high, count]:
            return (((left | high << 32) << count >> 32) + right) & _LOW
    return None
