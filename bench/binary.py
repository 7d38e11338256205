"""What a compiled kernel consists of, read from compilers' reports, and what it must not have.

NVIDIA: `cuobjdump --dump-resource-usage` with `nvdisasm`, or with PTX where the disassembler does
not know the chip or is not worth its time. AMD: the assembly Triton keeps, with its metadata.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes, block
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "MFMA"}

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_MATRIX = re.compile(r"(?:UTC[A-Z]*MMA|HGMMA|QGMMA|IGMMA|HMMA|QMMA|OMMA|IMMA|DMMA)$")
_PTX_MATRIX = {"UTCMMA": r"\btcgen05\.mma", "HGMMA": r"\bwgmma\.mma_async", "HMMA": r"\bmma\.sync"}


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers and stack per thread, shared memory per block in bytes.

    `spills` counts instructions that reach the stack (AMD: vector registers moved there), `matrix`
    the matrix instructions by family, `wide_loads` 16-byte loads of global memory, through
    registers or straight to shared memory; the latter are `copies` too, whatever their width.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    wide_loads: int
    copies: int
    matrix: dict[str, int] = field(default_factory=dict)
    source: str = "sass"


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one chip; `found` is None where that failed."""

    chip: str
    kernel: str
    dtype: str  # of what it reads first
    shape: str  # what it computes, and in tiles of which size
    main: bool  # must multiply on the chip's fastest matrix unit: a convolution in 16 bits
    found: Resources | None
    error: str = ""
    seconds: float = 0.0  # to compile, or to fetch from Triton's cache
    cases: tuple[str, ...] = ()  # what launches it


def parse_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes from `cuobjdump --dump-resource-usage` of one kernel.

    Raises:
        ValueError: It reports no kernel.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def parse_sass(text: str, usage: str, shared: int) -> Resources:
    """From `nvdisasm -c` and the resource usage; `shared` is what the launch asks for."""
    registers, stack = parse_usage(usage)
    opcodes = [match.split(".") for match in _OPCODE.findall(text)]
    names = Counter(name for name, *_ in opcodes)
    matrix: Counter[str] = Counter()
    for name, count in names.items():
        if _SASS_MATRIX.match(name):
            matrix["UTCMMA" if name.startswith("UTC") else name] += count
    return Resources(
        registers=registers,
        stack=stack,
        spills=names["STL"] + names["LDL"],
        shared=shared,
        instructions=len(opcodes),
        wide_loads=sum(op[0] in ("LDG", "LDGSTS") and "128" in op for op in opcodes),
        copies=names["LDGSTS"] + names["UTMALDG"] + names["UBLKCP"],
        matrix=dict(matrix),
    )


def parse_ptx(text: str, usage: str, shared: int) -> Resources:
    """Without the machine code: registers and stack are exact, and nothing spills without stack."""
    registers, stack = parse_usage(usage)
    lines = [line.strip() for line in text.splitlines()]
    code = [line for line in lines if re.match(r"(@!?%p\d+\s+)?[a-z][\w.:]+.*;", line)]
    body = "\n".join(code)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global.*?0x(\w+)", body)
    bulk = re.findall(r"\bcp\.async\.bulk\.(?:tensor|shared)", body)
    wide = re.findall(r"\bld\.global\S*\.v4\.[bfsu]32|\bld\.global\S*\.v2\.[bfsu]64", body)
    counts = {name: len(re.findall(pattern, body)) for name, pattern in _PTX_MATRIX.items()}
    return Resources(
        registers=registers,
        stack=stack,
        spills=0,
        shared=shared,
        instructions=len(code),
        wide_loads=len(wide) + copies.count("10"),
        copies=len(copies) + len(bulk),
        matrix={name: count for name, count in counts.items() if count},
        source="ptx",
    )


def parse_amdgcn(text: str, shared: int) -> Resources:
    """From the assembly of a gfx chip; accumulation registers count as registers."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        return int(found.group(1)) if found else 0

    if ".vgpr_count:" not in text:
        raise ValueError("no kernel metadata in the assembly")
    mnemonics = Counter(re.findall(r"^\t([a-z]+_[a-z0-9_]+)", text, re.MULTILINE))
    wide = ("global_load_dwordx4", "buffer_load_dwordx4", "flat_load_dwordx4")
    mfma = sum(count for name, count in mnemonics.items() if name.startswith("v_mfma"))
    to_lds = re.findall(r"^\t(?:global|buffer)_load_(?:lds_)?dword.*\blds\b", text, re.MULTILINE)
    return Resources(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),  # scalar registers move into lanes of vector ones
        shared=max(shared, number("group_segment_fixed_size")),
        instructions=mnemonics.total(),
        wide_loads=sum(mnemonics[name] for name in wide),
        copies=len(to_lds),
        matrix={"MFMA": mfma} if mfma else {},
        source="amdgcn",
    )


def violations(row: Row) -> list[str]:
    """What is wrong with a kernel, each in a few words."""
    if row.found is None:
        return [f"does not compile: {row.error}"]
    chip, found, main = row.chip, row.found, row.main
    wrong = []
    if found.stack:
        wrong.append(f"{found.stack} bytes of stack")
    if found.spills:
        what = "registers" if found.source == "amdgcn" else "instructions"
        wrong.append(f"{found.spills} spill {what}")
    if found.shared > SHARED_LIMIT[chip]:
        wrong.append(f"{found.shared} bytes of shared memory, {chip} has {SHARED_LIMIT[chip]}")
    unit = MATRIX[chip]
    if main and not found.matrix.get(unit):
        wrong.append(f"no {unit}: {_list(found.matrix)}")
    elif main and len(found.matrix) > 1:
        others = {name: n for name, n in found.matrix.items() if name != unit}
        wrong.append(f"falls back beside {unit}: {_list(others)}")
    return wrong


def _list(matrix: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in matrix.items()) or "no matrix instruction"
