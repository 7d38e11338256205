"""Check, then time, every operator of every backend on the layers of a ResEnc-L encoder.

Results are compared with the dense definition in float64 first; a backend that differs is refused
for that problem: its line says why and holds no time.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import torch

from sparsemae.bench.cases import DTYPES, KINDS, Problem, sparse_layers, work
from sparsemae.bench.expected import expected
from sparsemae.bench.forms import (
    Form,
    Inputs,
    Prepared,
    differences,
    dtype_of,
    forms,
    tolerances,
    truth,
)
from sparsemae.bench.harness import release_memory
from sparsemae.bench.timing import Ceilings, Spread, time_operators

Row = dict[str, object]


def measure(
    problems: Iterable[Problem],
    backends: tuple[str, ...],
    operators: tuple[str, ...],
    device: torch.device,
    ceilings: Ceilings,
    *,
    budget: float,
    seconds: float,
    on_problem: Callable[[Problem], None] = lambda problem: None,
) -> Iterator[Row]:
    """One row per problem, operator and form, and one for all that the budget left out.

    Args:
        budget: Seconds after which no further problem is started. One that does not fit the memory
            leaves a row that says so; one form that does not is passed over alone.
        seconds: To spend on timing one operator, all its forms together.
    """
    start, left = time.monotonic(), []
    for problem in problems:
        if time.monotonic() - start >= budget:
            left += [f"{op} {problem.name}" for op in KINDS[problem.kind] if op in operators]
            continue
        on_problem(problem)
        try:
            yield from _problem(problem, backends, operators, device, ceilings, seconds)
        except (torch.OutOfMemoryError, MemoryError):
            row = {"case": f"{problem.kind} {problem.name}", "backend": None, "ms": None}
            yield row | {"ratio": None, "skipped": "out of memory"}
        release_memory()
    if left:
        yield {"case": "left out", "backend": None, "ms": None, "ratio": None, "cases": left}


def _problem(problem, backends, operators, device, ceilings, seconds) -> Iterator[Row]:
    dtype = DTYPES[problem.dtype]
    chosen = forms(problem.kind, backends, device, dtype)
    inputs = Inputs(problem, device, dtype)
    right = truth(problem, inputs)
    ready: dict[Form, Prepared] = {}
    checks: dict[Form, Row] = {}
    for form in chosen:
        prepared, checks[form] = _check(problem, form, inputs, right)
        if prepared is not None:
            ready[form] = prepared
    del right
    for operator in KINDS[problem.kind]:
        if operator in operators:
            timings, peaks = _time(ready, operator, device, seconds)
            rows = [
                _row(problem, operator, form, timings.get(form), peaks.get(form), ceilings)
                | checks[form]
                for form in chosen
            ]
            yield from _with_ratios(rows)


def _check(problem, form, inputs, right) -> tuple[Prepared | None, Row]:
    """The problem in this form if its results are right, and what to note of it."""
    device = inputs.upstream.device
    dtype = dtype_of(form, inputs.upstream.dtype, device)
    note: Row = {"dtype": str(dtype).removeprefix("torch."), "refused": None, "skipped": None}
    try:
        prepared = Prepared(problem, form, inputs, dtype)
        _poison(right, dtype)
        errors = differences(prepared.results(), right)
    except torch.OutOfMemoryError:
        return None, note | {"skipped": "out of memory"}
    except Exception as error:  # a backend that fails must not stop the others
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return None, note | {"refused": f"{type(error).__name__}: {first}"}
    by_value, by_norm = tolerances(dtype, device)
    note |= {
        "max_error": max(value for value, _ in errors.values()),
        "norm_error": max(norm for _, norm in errors.values()),
        "checked_in": str(right["y"].dtype).removeprefix("torch."),
    }
    wrong = [
        f"{name} differs by {value:.1e} at most, {norm:.1e} in norm"
        for name, (value, norm) in errors.items()
        if not (value <= by_value and norm <= by_norm)
    ]
    if wrong:
        return None, note | {"refused": f"{'; '.join(wrong)} (allowed {by_value}, {by_norm})"}
    return prepared, note


def _poison(right: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Leave NaN in the memory results will be given, so that what stays unwritten shows."""
    for value in right.values():
        torch.full(value.shape, torch.nan, dtype=dtype, device=value.device)


def _time(
    ready: dict[Form, Prepared], operator: str, device: torch.device, seconds: float
) -> tuple[dict[Form, Spread], dict[Form, float]]:
    """Times of the forms in turn, and on CUDA the memory each takes: inputs, results, workspace."""
    runs, peaks = {}, {}
    for form, prepared in ready.items():
        runs[form] = prepared.operator(operator)
        if device.type == "cuda":
            runs[form]()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            runs[form]()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before
            held = [*prepared.values.values(), prepared.upstream]
            peaks[form] = (extra + sum(t.nbytes for t in held)) / 2**20
    return time_operators(runs, device, seconds) if runs else {}, peaks


def _row(problem, operator, form, spread, peak, ceilings) -> Row:
    """What was measured, and what it amounts to."""
    counted = work(problem, operator, dense=form.dense)
    row: Row = {
        "case": f"{operator} {problem.name}",
        "backend": form.backend,
        "layout": form.layout,
        "operator": operator,
        "layer": problem.layer.name,
        "count": problem.layer.count,
        "patch": problem.patch,
        "block": problem.cell,
        "batch": problem.batch,
        "mask_ratio": problem.mask_ratio,
        **(asdict(spread) if spread else dict.fromkeys(("ms", "ms_p20", "ms_p80", "rounds"))),
        "gflop": counted.flops / 1e9,
        "gbyte": counted.bytes / 1e9,
        **dict.fromkeys(("tflops", "gbps", "of_matmul", "of_copy", "expected_ms")),
        "peak_mib": peak,
        "ratio": None,
        "ratio_spconv": None,
    }
    if ceilings.l2_gbps and not form.dense:
        row["expected_ms"] = expected(problem, operator, ceilings).ms
    if spread:
        row["tflops"] = counted.flops / spread.ms / 1e9
        row["gbps"] = counted.bytes / spread.ms / 1e6
        row["of_matmul"] = row["tflops"] / ceilings.tflops
        row["of_copy"] = row["gbps"] / ceilings.gbps
    return row


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Speed against the better dense reference, and against spconv, where those were timed."""
    for row in rows:
        for key, rival in (("ratio", "reference"), ("ratio_spconv", "spconv")):
            times = [r["ms"] for r in rows if r["backend"] == rival and r["ms"] is not None]
            if times and row["ms"] is not None:
                row[key] = min(times) / row["ms"]
    return rows


def ceiling_rows(ceilings: Ceilings, timings: dict[str, Spread], dtype: str) -> list[Row]:
    """The ceilings as rows."""
    shared = {"backend": None, "ratio": None, "dtype": dtype}
    return [
        {
            "case": "ceiling matmul",
            **shared,
            **asdict(timings["matmul"]),
            "tflops": ceilings.tflops,
        },
        {"case": "ceiling copy", **shared, **asdict(timings["copy"]), "gbps": ceilings.gbps},
    ]


def encoder_totals(rows: list[Row], preset: str = "L") -> list[Row]:
    """Forward and backward of all convolutions of one encoder pass, where every layer was timed.

    The stem's input gradient does not count: nothing needs it. The reference is the better layout
    of each layer and pass. Stages coarser than the mask grid are dense everywhere and left out.
    """
    keys = ("patch", "block", "batch", "mask_ratio")
    groups: dict[tuple, dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        if row.get("operator") in KINDS["conv"] and row["ms"] is not None:
            passes = groups.setdefault(tuple(row[key] for key in keys), {})
            times = passes.setdefault((row["layer"], row["operator"]), {})
            ms = row["count"] * row["ms"]
            times[row["backend"]] = min(ms, times.get(row["backend"], ms))
    totals = []
    for group, passes in groups.items():
        setting = dict(zip(keys, group, strict=True))
        names = {layer.name for layer in sparse_layers(preset, setting["block"])}
        wanted = {(name, op) for name in names for op in KINDS["conv"]} - {("stem", "dgrad")}
        if not wanted <= set(passes):
            continue
        backends = set.intersection(*(set(passes[key]) for key in wanted))
        sums = {b: sum(passes[key][b] for key in wanted) for b in sorted(backends)}
        for backend, ms in sums.items():
            ratios = {
                name: sums[rival] / ms if rival in sums else None
                for name, rival in (("ratio", "reference"), ("ratio_spconv", "spconv"))
            }
            case = f"encoder convolutions {group[0]}^3 cell {group[1]} batch {group[2]} "
            totals.append(
                {"case": f"{case}{group[3]:.0%}", "backend": backend, "ms": ms} | ratios | setting
            )
    return totals
