"""`sparsemae compare`: methods x data sets x folds x seeds, run and put into tables and pictures.

OUT holds `runs/`, `stores/` and `jobs/`, and of all that is finished `summary.json`, `summary.csv`,
`report.html` and a rank diagram for development and for test sets.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sparsemae.comparison.jobs import JOBS, Job, chosen, command_lines, grid
from sparsemae.comparison.plots import drawn, rank_diagram
from sparsemae.comparison.runner import (
    FAILED,
    FINISHED,
    IN_USE,
    SOME_FAILED,
    check_same,
    run_jobs,
    state,
)
from sparsemae.comparison.scores import collect
from sparsemae.comparison.suite import Suite, read_suite
from sparsemae.comparison.summary import Block, as_csv, as_data, blocks, tables, title
from sparsemae.comparison.webpage import draw_page
from sparsemae.errors import UserError
from sparsemae.files import write_atomically
from sparsemae.live import say

PROGRAM = (sys.executable, "-m", "sparsemae")
SUMMARY, TABLE, REPORT = "summary.json", "summary.csv", "report.html"


def compare(
    suite: Path,
    output: Path,
    *,
    only: str | None = None,
    listing: Path | None = None,
    report_only: bool = False,
    stop: Callable[[], int] = lambda: 0,
    console: Console | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Run what is not finished, and report on what is. Run again, it goes on.

    Args:
        only: "I/N" for part I of N of the jobs, from 0, or the id of one.
        listing: Write a shell command for every job that is not finished, and run none.
        report_only: Run none.
        stop: Gives the exit code to stop with, else 0.
        program: The words that `sparsemae` is called with.

    Returns:
        The exit code: 0, 3 if a job failed, or what `stop` gave.

    Raises:
        UserError: The suite is wrong, something it names is missing, OUT holds something else, a
            job was made by another definition, or nothing is finished to report on.
        OSError: OUT cannot be written.
    """
    console = console or Console()
    checked = read_suite(suite)
    _check_folder(output)
    jobs = grid(checked, output)
    mine = chosen(jobs, only)
    check_same(jobs)
    if listing is not None:
        left = [job for job in mine if state(job) != FINISHED]
        write_atomically(listing, command_lines(left, program).encode())
        say(console, f"{listing}: {len(left)} jobs, a command to a line")
        return 0
    code = 0
    if not report_only:
        (output / JOBS).mkdir(parents=True, exist_ok=True)
        outcome = run_jobs(mine, program, stop=stop, console=console)
        if (code := outcome.code) not in (0, SOME_FAILED):
            say(console, "stopped as asked; the same command goes on")
            return code
        for kind in (FAILED, IN_USE):
            if count := outcome.counts[kind]:
                say(console, f"{count} of {len(mine)} jobs {kind}")
    states = Counter(map(state, jobs))
    if only is not None and not report_only and states[FINISHED] < len(jobs):
        command = f"sparsemae compare {suite} -o {output} --report-only"
        say(console, f"{states[FINISHED]} of {len(jobs)} jobs finished; for a report: {command}")
        return code
    if states[FINISHED] or report_only:
        _report(checked, output, jobs, states, console)
    return code


def _report(
    suite: Suite, output: Path, jobs: Sequence[Job], states: Counter, console: Console
) -> None:
    """Write all files anew, and print the tables."""
    if not states[FINISHED]:
        raise UserError(f"{output}: no job is finished; run it without --report-only")
    collected = collect(jobs)
    found = blocks(collected)
    data = as_data(suite.options.name, found, collected) | {"jobs": dict(states)}
    diagrams = {block.role: _diagram(block, output) for block in found}
    write_atomically(output / SUMMARY, json.dumps(data, indent=1).encode())
    write_atomically(output / TABLE, as_csv(found).encode())
    html = draw_page(suite, dict(states), found, collected, diagrams)
    write_atomically(output / REPORT, html.encode())
    for block in found:
        for table in tables(block):
            console.print(table)
    for line in collected.missing:
        say(console, line)
    say(console, f"{output / REPORT}")


def _diagram(block: Block, output: Path) -> bytes:
    """Write the rank diagram in both forms; gives the SVG."""
    ranks = [estimate.value for estimate in block.statistics.mean_rank]
    heading = f"Mean rank, {title(block)}"
    figure = rank_diagram(block.methods, ranks, block.statistics.groups, heading)
    pictures = {kind: drawn(figure, kind) for kind in ("png", "svg")}
    for kind, picture in pictures.items():
        write_atomically(output / f"cd-{block.role}.{kind}", picture)
    return pictures["svg"]


def _check_folder(output: Path) -> None:
    """Refuse a folder that holds anything but a comparison."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose another -o")
    if output.exists() and any(output.iterdir()) and not (output / JOBS).is_dir():
        raise UserError(f"{output} exists already and holds no comparison: choose another -o")
