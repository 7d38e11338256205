"""Compile every kernel the package would launch, for chips that are not here, and judge the result.

What is launched comes from `shipped.py`. Each kernel is compiled with the attributes Triton's own
launcher would give it, so this also fills Triton's cache: a GPU of that kind starts without
compiling.
"""

import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager

from sparsemae.bench import binary
from sparsemae.bench.binary import (
    Resources,
    Row,
    parse_amdgcn,
    parse_ptx,
    parse_sass,
    parse_usage,
    violations,
)
from sparsemae.bench.shipped import Kernel, record
from sparsemae.errors import UserError

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHIPS = tuple(TARGETS)
Launched = dict[Kernel, tuple[str, ...]]  # kernels, and what launches them
# Kernels that must multiply on the chip's fastest matrix unit where operands have 16 bits.
MAIN = ("_march_kernel", "_gather_kernel", "_spread_kernel", "_wgrad_kernel")


def require_compiler() -> None:
    """Raise a UserError where kernels are interpreted: they cannot be compiled then."""
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted: unset it to compile")


def compile_kernel(kernel: Kernel) -> tuple[Resources, float]:
    """Compile for `kernel.chip`, or take it from Triton's cache; what it holds, and seconds."""
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    target, signature = TARGETS[kernel.chip], dict(kernel.signature)
    # as JITFunction's own: pointers aligned to 16 bytes, on AMD below 2 GiB; constants unspecified
    aligned = "DS" if target.backend == "hip" else "D"
    parse, names = make_backend(target).parse_attr, function.arg_names
    attributes = {}
    for i, name in enumerate(names):
        kind = signature.get(name, "constexpr")
        if kind == "constexpr" or kind.startswith("*"):
            attributes[(i,)] = parse("" if kind == "constexpr" else aligned)
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.constants},
        attrs=attributes,
    )
    start = time.perf_counter()
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    done = triton.compile(source, target, options)
    seconds = time.perf_counter() - start
    cache, name = get_cache_manager(done.hash), f"resources-{_parsers()}.json"
    known = cache.get_file(name)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text())), seconds
    found = _resources(kernel, done)
    cache.put(json.dumps(asdict(found)), name, binary=False)
    return found, seconds


@functools.cache
def _parsers() -> str:
    """What parsed results in Triton's cache depend on, beside the kernel."""
    return hashlib.sha256(Path(binary.__file__).read_bytes()).hexdigest()[:16]


def _resources(kernel: Kernel, done) -> Resources:
    shared = done.metadata.shared
    if kernel.chip.startswith("gfx"):
        return parse_amdgcn(done.asm["amdgcn"], shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = _nvidia("cuobjdump", "--dump-resource-usage", file.name).stdout
        # the disassembler takes longer than the compiler: only where rules look at instructions
        if is_main(kernel) or parse_usage(usage)[1]:
            code = _nvidia("nvdisasm", "-c", file.name)
            if not code.returncode:
                return parse_sass(code.stdout, usage, shared)
    return parse_ptx(done.asm["ptx"], usage, shared)


def is_main(kernel: Kernel) -> bool:
    """Whether it must multiply on the chip's fastest matrix unit: a convolution in 16 bits."""
    return kernel.name in MAIN and kernel.dtype in ("bfloat16", "float16")


def _nvidia(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a tool of Triton's own package."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True)


def _row(kernel: Kernel, cases: tuple[str, ...]) -> Row:
    main = is_main(kernel)
    return Row(kernel.chip, kernel.name, kernel.dtype, kernel.shape, main, None, cases=cases)


def judge(kernel: Kernel, cases: tuple[str, ...] = ()) -> Row:
    """The row of one kernel; a failure to compile is a row too."""
    row = _row(kernel, cases)
    try:
        found, seconds = compile_kernel(kernel)
    except Exception as error:  # the compiler's own errors have no common type
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return replace(row, error=f"{type(error).__name__}: {first}")
    return replace(row, found=found, seconds=seconds)


def run(
    chips: tuple[str, ...],
    names: tuple[str, ...] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Record and compile on every core; rows in the order of chips, kernels and shapes.

    Args:
        names: Only kernels of these names; all if empty.
    """
    require_compiler()
    found: Launched = {}
    with _pool(os.cpu_count()) as pool:
        for launched in pool.map(record, chips):
            found |= {k: cases for k, cases in launched.items() if not names or k.name in names}
    rows = []
    for row in judge_all(found):
        rows.append(row)
        on_progress(len(rows), len(found))
    return sorted(rows, key=lambda r: (chips.index(r.chip), r.kernel, r.dtype, r.shape))


def judge_all(kernels: Launched) -> Iterator[Row]:
    """Rows in the order they are done, on every core.

    A compiler that fails an assertion takes its process down, and the pool with it: what was being
    compiled then is compiled again, each kernel alone, and the rest goes on.
    """
    waiting = dict(kernels)
    while waiting:
        with tempfile.TemporaryDirectory() as folder, _pool(os.cpu_count()) as pool:
            jobs = {}
            for i, (kernel, cases) in enumerate(waiting.items()):
                mark = Path(folder, str(i))  # is there while it is being compiled
                jobs[pool.submit(_judge_marked, kernel, cases, mark)] = kernel, mark
            for job in as_completed(jobs):
                if not isinstance(job.exception(), BrokenProcessPool):
                    del waiting[jobs[job][0]]
                    yield job.result()
            suspects = [kernel for kernel, mark in jobs.values() if mark.exists()]
        if waiting and not suspects:
            raise RuntimeError("processes of the compiler die before they compile anything")
        for kernel in suspects:
            yield _judge_alone(kernel, waiting.pop(kernel))


def _judge_marked(kernel: Kernel, cases: tuple[str, ...], mark: Path) -> Row:
    mark.touch()
    row = judge(kernel, cases)
    mark.unlink()
    return row


def _judge_alone(kernel: Kernel, cases: tuple[str, ...]) -> Row:
    with _pool(1) as pool:
        try:
            return pool.submit(judge, kernel, cases).result()
        except BrokenProcessPool:
            return replace(_row(kernel, cases), error="the compiler took its process down")


def _pool(processes: int | None) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def json_rows(rows: list[Row], origin: dict[str, object]) -> list[dict[str, object]]:
    """One JSON object per kernel; `device` is the chip it was compiled for."""
    lines = []
    for row in rows:
        line = {"case": f"static {row.kernel}", "backend": "triton", "ms": None, "ratio": None}
        line |= origin | {key: value for key, value in asdict(row).items() if key != "found"}
        line |= asdict(row.found) if row.found else {}
        lines.append(line | {"device": row.chip, "violations": violations(row)})
    return lines


HEADER = (
    *("kernel", "reads", "chip", "forms", "registers", "stack", "spills", "shared KiB"),
    *("instructions", "matrix", "16-byte loads", "copies"),
)


def summary(rows: list[Row]) -> list[list[str]]:
    """One line per kernel, precision and chip: the range over its forms, see HEADER."""
    groups: dict[tuple[str, str, str], list[Resources]] = {}
    for row in rows:
        group = groups.setdefault((row.kernel, row.dtype, row.chip), [])
        group += [row.found] if row.found else []
    lines = []
    for (kernel, dtype, chip), found in sorted(groups.items(), key=lambda item: _order(*item[0])):
        if not found:
            lines.append([kernel, dtype, chip, "0", *[""] * (len(HEADER) - 4)])
            continue
        units = sorted({unit for f in found for unit in f.matrix})
        matrix = [f"{_range(f.matrix.get(unit, 0) for f in found)} {unit}" for unit in units]
        lines.append(
            [
                *(kernel.strip("_").removesuffix("_kernel"), dtype, chip, str(len(found))),
                *(_range(f.registers for f in found), _range(f.stack for f in found)),
                *(
                    _range(f.spills for f in found),
                    _range(math.ceil(f.shared / 1024) for f in found),
                ),
                *(_range([f.instructions for f in found if f.source != "ptx"]), ", ".join(matrix)),
                *(_range(f.wide_loads for f in found), _range(f.copies for f in found)),
            ]
        )
    return lines


def _order(kernel: str, dtype: str, chip: str):
    first = MAIN.index(kernel) if kernel in MAIN else len(MAIN)
    return first, kernel, dtype, CHIPS.index(chip)


def _range(values: Iterable[int]) -> str:
    values = list(values)
    if not values:
        return ""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
