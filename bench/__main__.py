"""Measure: `python -m sparsemae.bench step|kernels|data|quality|static|tune --help`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from sparsemae.bench.harness import append_json, machine, peak_mib, release_memory, time_in_turn
from sparsemae.bench.step import (
    Runner,
    Setting,
    Variant,
    build,
    check,
    parse_setting,
    require_device,
    variants_on,
)
from sparsemae.bench.tables import markdown_table, rich_table, write_markdown
from sparsemae.errors import UserError

app = typer.Typer(
    help="Benchmarks of sparsemae. Every result is checked before it is timed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    dtype: Annotated[str, typer.Option(help="float32; bfloat16 is autocast, on cuda.")] = "float32",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
) -> None:
    """Encoder and training step against simulated sparsity."""
    console = Console()
    setting = parse_setting(device, patch, block, mask_ratio, batch, preset, threads, dtype)
    torch.set_num_threads(threads)
    place, variants = torch.device(device), variants_on(device)
    with console.status("checking against the reference"):
        check(variants, setting)
    timings, peaks = {}, {}
    for cases in (("encoder",), ("step-all", "step-masked", "step-third")):
        chosen = [v for v in variants if v.case in cases]
        with console.status(f"timing {', '.join(cases)}"):
            runners: dict[str, Runner] = {v.name: build(v, setting) for v in chosen}
            timings |= time_in_turn(runners, place, rounds)
            runners.clear()
            release_memory()
    if memory:
        with console.status("measuring peak memory"):
            peaks = {v.name: peak_mib(build, place, v, setting) for v in variants}
    rows = _rows(variants, setting, timings, peaks, machine(place))
    console.print(_table(setting, rows))
    if json is not None:
        append_json(json, rows)
        console.print(f"{len(rows)} lines appended to {json}")


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    patch: Annotated[int, typer.Option(help="Voxels per axis.")] = 160,
    block: Annotated[list[int] | None, typer.Option(help="Voxels of a cell: 16, 32.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples: 2, 8.")] = None,
    mask_ratio: Annotated[list[float] | None, typer.Option(help="0.75, 0.6, 0.9, 0.")] = None,
    operator: Annotated[list[str] | None, typer.Option(help="fwd, dgrad, wgrad...; all.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="All that run here.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="0 to 5, or stem, down1...")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on cuda, float32 on cpu.")] = None,
    preset: Annotated[str, typer.Option(help="Of the network.")] = "L",
    budget: Annotated[float, typer.Option(help="Seconds; then no case is started.")] = 3600,
    seconds: Annotated[float, typer.Option(help="To time an operator, all backends.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
    expect: Annotated[bool, typer.Option(help="Predict for an H200, measure nothing.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="With --expect: a document.")] = None,
) -> None:
    """Every operator on every layer of an encoder: checked, then timed. Exit code 1: one is wrong.

    Options may be repeated. What is given first, or is a default's first value, is measured first.
    """
    from sparsemae.bench.cases import KINDS, OPERATORS, Selection, problems

    few = ((16,), (2,), (0.75,), tuple(KINDS["conv"]))
    usual = few if expect else ((16, 32), (2, 8), (0.75, 0.6, 0.9, 0.0), OPERATORS)
    given = (block, batch, mask_ratio, operator)
    chosen = (tuple(g) if g else d for g, d in zip(given, usual, strict=True))
    on_gpu = device == "cuda" or expect
    selection = Selection(
        *(patch, *chosen, tuple(stage or ())),
        *(dtype or ("bfloat16" if on_gpu else "float32"), preset),
    )
    cases = list(problems(selection))
    if expect:
        _expect(selection, cases, markdown)
        return
    place = require_device(device)
    rows = _measure(selection, cases, tuple(backend or ()), place, budget, seconds, json)
    if plot is not None:
        from sparsemae.bench.plots import plot as draw

        for path in draw(rows, plot):
            print(path)
    if any(row.get("refused") for row in rows):
        raise typer.Exit(1)


def _expect(selection, cases, markdown: Path | None) -> None:
    from sparsemae.bench.report import EXPECTED, predictions
    from sparsemae.bench.timing import H200

    title = (
        f"expected on an H200, {selection.dtype}, microseconds unless named: {H200.tflops} "
        f"TFLOP/s, {H200.gbps} GB/s, L2 {H200.l2_gbps} GB/s"
    )
    lines = predictions(cases, selection.operators, H200, selection.preset)
    _console().print(rich_table(title, EXPECTED, lines))
    if markdown is not None:
        write_markdown(markdown, "expected", markdown_table(EXPECTED, lines))


def _measure(selection, cases, backends, place, budget, seconds, json) -> list[dict[str, object]]:
    """All rows, completed with the machine, appended to `json` as they come."""
    from sparsemae.bench.cases import DTYPES
    from sparsemae.bench.kernels import ceiling_rows, encoder_totals, measure
    from sparsemae.bench.report import measured
    from sparsemae.bench.timing import measure_ceilings
    from sparsemae.kernels import available

    for name in set(backends) - set(available()):
        raise UserError(f"--backend {name}: here are {', '.join(available())}")
    console, origin, rows = _console(), machine(place), []

    def keep(new) -> None:
        new = [row | origin for row in new]
        rows.extend(new)
        if json is not None:
            append_json(json, new)

    ceilings, timings = measure_ceilings(place, DTYPES[selection.dtype], 2 * seconds)
    keep(ceiling_rows(ceilings, timings, selection.dtype))
    print(f"{origin['device']}: {ceilings.tflops:.4g} TFLOP/s, copies {ceilings.gbps:.4g} GB/s")
    for row in measure(
        *(cases, backends or tuple(available()), selection.operators, place, ceilings),
        budget=budget,
        seconds=seconds,
        on_problem=lambda problem: print(f"{problem.kind} {problem.name}", flush=True),
    ):
        keep([row])
    keep(encoder_totals(rows, selection.preset))
    title = f"{selection.dtype}, {origin['device']}; 'vs dense' is against the better layout"
    console.print(rich_table(title, *measured(rows)))
    for row in rows:
        if row["case"] == "left out":
            print(f"left out after {budget:g} s: {len(row['cases'])} cases, {row['cases'][0]} ...")
        elif row.get("refused"):
            print(f"refused: {row['case']}, {row['backend']}: {row['refused']}")
        elif row.get("skipped"):
            print(f"skipped: {row['case']}, {row['backend'] or 'all'}: {row['skipped']}")
    return rows


@app.command()
def data(
    patch: Annotated[list[int] | None, typer.Option(help="Voxels per axis: 96, 160.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="preprocess, read, augment, wait; all.")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Folder of NIfTI files; without, heads are drawn.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Heads to draw.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Voxels per axis of a drawn head.")] = 192,
    samples: Annotated[int, typer.Option(min=1, help="Timed reads of each form.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Patches of a batch.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda, to augment and train on.")] = "cpu",
    preset: Annotated[str, typer.Option(help="Of the network that waits for data.")] = "L",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes for it.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of it.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 2,
    work: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; a temporary one.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
) -> None:
    """From files to patches: preprocessing, reading against nibabel and nnU-Net, augmentation."""
    from sparsemae.bench.data import PARTS, Plan, measure_data
    from sparsemae.bench.datareport import tables

    for name in set(part or ()) - set(PARTS):
        raise UserError(f"--part {name}: choose from {', '.join(PARTS)}")
    place = require_device(device)
    torch.set_num_threads(threads)
    plan = Plan(
        *(tuple(patch or (96, 160)), tuple(part or PARTS), volumes, count, size, samples, batch),
        *(place, preset, workers, steps),
    )
    console, origin, rows = _console(), machine(place), []
    for row in measure_data(plan, work):
        rows.append(row | origin)
        if json is not None:
            append_json(json, rows[-1:])
    for title, header, lines, left in tables(rows):
        console.print(rich_table(f"{title}, {origin['device']}", header, lines, left))


@app.command()
def quality(
    labelled: Annotated[Path, typer.Argument(help="In nnU-Net's raw layout, with test cases.")],
    unlabelled: Annotated[Path, typer.Argument(help="Folder of volumes to pre-train on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; run again, it goes on.")],
    cases: Annotated[int, typer.Option(min=1, help="Labelled cases to train on.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each start.")] = 3,
    recipe: Annotated[str, typer.Option(help="Of pre-training.")] = "tiny",
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Of pre-training.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning, for both starts.")] = 300,
    spacing: Annotated[float, typer.Option(help="mm.")] = 4.0,
    patch: Annotated[int, typer.Option(min=16, help="Voxels per axis.")] = 40,
    pretrain_set: Annotated[list[str] | None, typer.Option(help="KEY=VALUE.")] = None,
    finetune_set: Annotated[list[str] | None, typer.Option(help="KEY=VALUE.")] = None,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
) -> None:
    """What pre-training is worth: from it against from scratch, with few labels."""
    from sparsemae.bench.quality import Setting, measure_quality

    setting = Setting(
        *(labelled, unlabelled, cases, seeds, recipe, pretrain_steps, steps, spacing, patch),
        *(tuple(pretrain_set or ()), tuple(finetune_set or ())),
    )
    origin = machine(torch.device("cpu"))
    rows = [row | origin for row in measure_quality(setting, output)]
    if json is not None:
        append_json(json, rows)
    for row in rows:
        dice = row["dice"]
        typer.echo(
            f"{row['start']}: Dice {dice['value']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]"
        )


@app.command()
def static(
    chip: Annotated[list[str] | None, typer.Option(help="sm_90...; all four.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only these, by name.")] = None,
    json: Annotated[Path | None, typer.Option(help="File to append JSON lines to.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Document to put the table in.")] = None,
) -> None:
    """Compile every shipped kernel for chips that need not be here. Exit code 1: one breaks a rule.

    Rules: no stack, no spills, shared memory within the chip's limit, its matrix instructions.
    """
    from sparsemae.bench.binary import violations
    from sparsemae.bench.static import CHIPS, HEADER, json_rows, run, summary

    for name in set(chip or ()) - set(CHIPS):
        raise UserError(f"--chip {name}: choose from {', '.join(CHIPS)}")
    console = _console()
    with console.status("recording what is launched") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"compiling: {done} of {total}")

        rows = run(tuple(chip or CHIPS), tuple(kernel or ()), progress)
    lines = summary(rows)
    console.print(rich_table(f"{len(rows)} compiled kernels", HEADER, lines, left=3))
    broken = [(row, wrong) for row in rows for wrong in violations(row)]
    for row, wrong in broken:
        print(f"{row.chip} {row.kernel} {row.dtype} {row.shape}: {wrong}")
    print(f"{len(broken)} violations")
    if json is not None:
        append_json(json, json_rows(rows, machine(torch.device("cpu"))))
    if markdown is not None:
        write_markdown(markdown, "static", markdown_table(HEADER, lines, left=3))
    if broken:
        raise typer.Exit(1)


@app.command()
def tune(
    device: Annotated[
        str, typer.Option(help="cuda: times of another device tell nothing.")
    ] = "cuda",
    patch: Annotated[int, typer.Option(help="Voxels per axis.")] = 160,
    block: Annotated[list[int] | None, typer.Option(help="Voxels of a cell: 16, 32.")] = None,
    batch: Annotated[int, typer.Option(help="Samples.")] = 2,
    mask_ratio: Annotated[float, typer.Option(help="Fraction of cells hidden.")] = 0.75,
    stage: Annotated[list[str] | None, typer.Option(help="0 to 5, or stem, down1...")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    preset: Annotated[str, typer.Option(help="Of the network.")] = "L",
    budget: Annotated[float, typer.Option(help="Seconds; then no shape is started.")] = 3600,
    seconds: Annotated[float, typer.Option(help="To time the tiles of a shape.")] = 2.0,
    table: Annotated[Path | None, typer.Option(help="tiles.toml to write; the package's.")] = None,
) -> None:
    """Time the tiles of every convolution on this GPU and write the faster ones into the table."""
    from sparsemae.bench.cases import KINDS, Selection
    from sparsemae.bench.tune import SHIPPED, merge, tune_all

    if require_device(device).type != "cuda":
        raise UserError(f"--device {device}: tiles are chosen on the GPU they are for; use cuda")
    cells = tuple(block or (16, 32))
    selection = Selection(
        *(patch, cells, (batch,), (mask_ratio,), tuple(KINDS["conv"]), tuple(stage or ())),
        *(dtype, preset),
    )

    def show(outcome) -> None:
        verdict = "kept" if outcome.tile is None else f"{outcome.ms / outcome.best_ms:.2f}x faster"
        name = " ".join(map(str, outcome.target.key))
        print(f"{name}: {outcome.ms:.3f} ms, {outcome.tried} tiles tried, {verdict}", flush=True)

    outcomes = tune_all(selection, torch.device(device), seconds, budget, show)
    path = table or SHIPPED
    print(f"{merge(path, outcomes)} entries changed in {path}; run `static` on them before use")


def _console() -> Console:
    """As wide as the terminal; in a file, as wide as the tables."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _rows(variants, setting: Setting, timings, peaks, origin) -> list[dict[str, object]]:
    """One JSON row per variant; ratios against the best baseline of its kind."""
    rows = []
    for variant in variants:
        rivals = [v for v in variants if v.baseline and _kind(v) == _kind(variant)]
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
            | origin
        )
    return rows


def _kind(variant: Variant) -> str:
    return variant.case.partition("-")[0]


def _table(setting: Setting, rows: list[dict[str, object]]) -> Table:
    title = (
        f"ResEnc-{setting.preset}, {setting.batch} x {setting.patch}^3, cells of "
        f"{setting.block}^3, {setting.mask_ratio:.0%} masked, {setting.dtype}, "
        f"{rows[0]['device']}, {setting.threads} threads"
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
