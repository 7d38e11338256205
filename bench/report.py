"""The kernel benchmark's rows as tables: what was measured, and what was to be expected."""

import math
from collections.abc import Sequence

from sparsemae.bench.cases import KINDS, Problem, sparse_layers, work
from sparsemae.bench.expected import Expected, expected
from sparsemae.bench.timing import Ceilings

Row = dict[str, object]

BACKENDS = ("reference", "spconv", "torch", "triton")
RATES = ("TFLOP/s", "GB/s", "of ceiling", "expected", "vs dense", "vs spconv", "peak MiB")
EXPECTED = (
    *("case", "times", "GFLOP", "MB", "products", "memory", "L2", "L2, every tap"),
    *("ms", "bound by", "dense ms", "vs dense"),
)


def measured(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: one per case, the backends side by side, ms as median (20 - 80 %).

    The reference is the better of its layouts. Rates, ceilings, ratios and memory are of the last
    of torch and triton that was timed.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["backend"] is not None:
            best = cases.setdefault(str(row["case"]), {})
            other = best.get(str(row["backend"]))
            if other is None or other["ms"] is None or (row["ms"] or math.inf) < other["ms"]:
                best[str(row["backend"])] = row
    backends = [b for b in BACKENDS if any(b in best for best in cases.values())]
    header = ["case", *(f"{b} ms" for b in backends), *RATES]
    return header, [
        [case, *(_time(best.get(b)) for b in backends), *_rates(best)]
        for case, best in cases.items()
    ]


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return "refused" if row["refused"] else "skipped"
    around = f" ({_number(row['ms_p20'])} - {_number(row['ms_p80'])})" if "ms_p20" in row else ""
    return _number(row["ms"]) + around


def _rates(best: dict[str, Row]) -> list[str]:
    ours = [best[b] for b in ("triton", "torch") if b in best and best[b]["ms"] is not None]
    if not ours:
        return [""] * len(RATES)
    row = ours[0]
    bounds = [row[key] for key in ("of_matmul", "of_copy") if row.get(key)]
    return [
        *(_number(row.get("tflops") or None), _number(row.get("gbps"))),
        f"{max(bounds):.0%}" if bounds else "",
        *(_number(row.get("expected_ms")), _times(row["ratio"]), _times(row.get("ratio_spconv"))),
        "" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}",
    ]


def predictions(
    problems: Sequence[Problem], operators: tuple[str, ...], ceilings: Ceilings, preset: str = "L"
) -> list[list[str]]:
    """Lines under EXPECTED, microseconds but where milliseconds are named; then the encoder's sum.

    The dense time is the same prediction for all voxels, without L2 traffic.
    """
    lines, found = [], []
    for problem in problems:
        for operator in KINDS[problem.kind]:
            if operator in operators:
                sparse = expected(problem, operator, ceilings)
                dense = expected(problem, operator, ceilings, dense=True)
                found.append((problem, operator, sparse, dense))
                lines.append(_predicted(problem, operator, sparse, dense))
    return lines + _encoder(found, preset)


def _predicted(problem: Problem, operator: str, sparse: Expected, dense: Expected) -> list[str]:
    counted = work(problem, operator, dense=False)
    parts = (sparse.tensor, sparse.memory, sparse.l2, sparse.l2_taps)
    return [
        *(f"{operator} {problem.name}", str(problem.layer.count)),
        *(_number(counted.flops / 1e9), _number(counted.bytes / 1e6)),
        *(_number(1e3 * part) if part else "" for part in parts),
        *(_number(sparse.ms), sparse.bound, _number(dense.ms), _times(dense.ms / sparse.ms)),
    ]


def _encoder(found, preset: str) -> list[list[str]]:
    """All convolutions of one encoder pass forward and backward, where all of them are asked for.

    Without the stem's input gradient, which nothing needs.
    """
    groups: dict[tuple, list] = {}
    for problem, operator, sparse, dense in found:
        if problem.kind == "conv" and (problem.layer.name, operator) != ("stem", "dgrad"):
            key = problem.patch, problem.cell, problem.batch, problem.mask_ratio
            groups.setdefault(key, []).append((problem.layer, sparse.ms, dense.ms))
    lines = []
    for (patch, cell, batch, ratio), parts in groups.items():
        if len(parts) == 3 * len(sparse_layers(preset, cell)) - 1:
            sparse, dense = (sum(p[0].count * p[i] for p in parts) for i in (1, 2))
            name = f"encoder convolutions {patch}^3 cell {cell} batch {batch} {ratio:.0%}"
            times = [_number(sparse), "", _number(dense), _times(dense / sparse)]
            lines.append([name, *[""] * (len(EXPECTED) - 5), *times])
    return lines


def _number(value: float | None) -> str:
    """Three digits that count."""
    if not value:
        return "" if value is None else "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
