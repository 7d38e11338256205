"""Measure: `python -m sparsemae.bench step --device cpu --patch 96 --block 16 --json FILE`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from sparsemae.bench.harness import append_json, machine, peak_mib, release_memory, time_in_turn
from sparsemae.bench.step import VARIANTS, Runner, Setting, Variant, build, check, parse_setting
from sparsemae.errors import UserError

app = typer.Typer(
    help="Benchmarks of sparsemae. Every result is checked before it is timed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
MEMORY_FLOOR = 0.6  # of the baseline's peak


@app.callback()
def _commands() -> None:
    """Keep `step` a command of its own while it is the only one."""


@app.command()
def step(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    patch: Annotated[int, typer.Option(help="Voxels per axis.")] = 96,
    block: Annotated[int, typer.Option(help="Voxels of a mask cell per axis.")] = 16,
    mask_ratio: Annotated[float, typer.Option(help="Fraction of cells hidden.")] = 0.75,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    preset: Annotated[str, typer.Option(help="Of the network.")] = "L",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
) -> None:
    """Encoder and training step against simulated sparsity, fp32."""
    console = Console()
    setting = parse_setting(device, patch, block, mask_ratio, batch, preset, threads)
    torch.set_num_threads(threads)
    place = torch.device(device)
    with console.status("checking against the reference"):
        check(VARIANTS, setting)
    timings, peaks = {}, {}
    for cases in (("encoder",), ("step-all", "step-masked", "step-third")):
        chosen = [v for v in VARIANTS if v.case in cases]
        with console.status(f"timing {', '.join(cases)}"):
            runners: dict[str, Runner] = {v.name: build(v, setting) for v in chosen}
            timings |= time_in_turn(runners, place, rounds)
            runners.clear()
            release_memory()
    if memory:
        with console.status("measuring peak memory"):
            peaks = {v.name: peak_mib(build, place, v, setting) for v in VARIANTS}
    rows = _rows(setting, timings, peaks, machine(place))
    console.print(_table(setting, rows))
    if json is not None:
        append_json(json, rows)
        console.print(f"{len(rows)} lines appended to {json}")


def _rows(setting: Setting, timings, peaks, origin) -> list[dict[str, object]]:
    """One JSON row per variant; ratios against the best baseline of its kind."""
    rows = []
    for variant in VARIANTS:
        rivals = [v for v in VARIANTS if v.baseline and _kind(v) == _kind(variant)]
        best = min(rivals, key=lambda v: timings[v.name].ms)
        peak = peaks.get(variant.name)
        lowest = min((peaks[v.name] for v in rivals if v.name in peaks), default=None)
        rows.append(
            {"case": variant.case, "backend": variant.backend, "variant": variant.name}
            | asdict(timings[variant.name])
            | {"ratio": timings[best.name].ms / timings[variant.name].ms, "floor": variant.floor}
            | {"baseline": best.name, "peak_mib": peak}
            | {"peak_ratio": None if peak is None else peak / lowest}
            | asdict(setting)
            | {"dtype": "float32"}
            | origin
        )
    return rows


def _kind(variant: Variant) -> str:
    return variant.case.partition("-")[0]


def _table(setting: Setting, rows: list[dict[str, object]]) -> Table:
    title = (
        f"ResEnc-{setting.preset}, {setting.batch} x {setting.patch}^3, cells of "
        f"{setting.block}^3, {setting.mask_ratio:.0%} masked, fp32, {rows[0]['device']}, "
        f"{setting.threads} threads"
    )
    table = Table(title=title)
    for name in ("variant", "ms", "min - max", "speed", "floor", "peak MiB", "of baseline"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.1f}x"
        has_peak = row["peak_mib"] is not None
        table.add_row(
            *(row["variant"], f"{row['ms']:.0f}", f"{row['ms_min']:.0f} - {row['ms_max']:.0f}"),
            *(f"{row['ratio']:.2f}x", floor),
            f"{row['peak_mib']:.0f}" if has_peak else "",
            f"{row['peak_ratio']:.2f}x" if has_peak else "",
        )
    return table


def main() -> None:
    """Run a benchmark; bad input is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"sparsemae.bench: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
