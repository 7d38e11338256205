"""`sparsemae preprocess`: options to a configuration, the run and its progress, an exit code."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsemae.config import apply_overrides, build_config
from sparsemae.data.making.ledger import FAILURES, PAGES, WARNINGS
from sparsemae.data.making.watch import PreprocessProgress, describe
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preprocess import Shard, Summary, preprocess
from sparsemae.errors import UserError
from sparsemae.signals import PREEMPTED

SOME_REJECTED, INTERRUPTED = 3, 130


def settings(
    spacing: str,
    normalization: str,
    window: str,
    dtype: str,
    frame: int | None,
    quality: bool,
    *,
    overrides: Sequence[str],
) -> PreprocessConfig:
    """The configuration that the command's options describe; `UserError` names the option."""
    raw: dict[str, Any] = {
        "spacing": _spacing(spacing),
        "normalization": normalization,
        "window": _window(window),
        "dtype": dtype,
        "frame": frame,
    }
    if quality:
        raw["filter"] = {}
    apply_overrides(raw, overrides)
    return build_config(PreprocessConfig, raw)


def run_preprocess(
    sources: Sequence[str],
    store: Path,
    config: PreprocessConfig,
    *,
    shard: str | None,
    stopped: Callable[[], bool],
    **options: Any,
) -> int:
    """Run `preprocess`, say what came of it, and return the exit code."""
    console = Console()
    part = None if shard is None else _shard(shard)
    try:
        with PreprocessProgress(console) as progress:
            summary = preprocess(
                *(sources, store, config),
                shard=part,
                on_outcome=progress.update,
                stopped=stopped,
                **options,
            )
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, the same command goes on")
        return INTERRUPTED
    return _report(summary, store, part, verified=options["verify"])


def _report(summary: Summary, store: Path, part: Shard | None, *, verified: bool) -> int:
    counts = summary.progress
    if summary.stopped:
        print(
            f"stopped as asked after {counts.done} of {counts.total} volumes: "
            f"what is done is kept, the same command goes on"
        )
        return PREEMPTED
    if summary.store is None:
        print(f"shard {part.index}/{part.count}: {describe(counts, 0)}")
    else:
        print(f"{counts.ok} volumes stored in {store}")
        if verified:
            print(f"verified: {counts.made} were made in this run, the others are whole")
        if summary.warnings:
            codes = ", ".join(f"{n} {code}" for code, n in summary.warnings.most_common())
            print(f"warnings: {codes}; see {store / WARNINGS}")
        _draw(store)
    left_out = [
        f"{n} {what}"
        for n, what in ((counts.rejected, "rejected"), (counts.filtered, "filtered"))
        if n
    ]
    if not left_out:
        return 0
    where = f"see {store / FAILURES}" if summary.store else "--merge records them"
    print(f"{' and '.join(left_out)}, {where}")
    return SOME_REJECTED


def _draw(store: Path) -> None:
    """The pages to look at; the store is whole without them."""
    try:
        from sparsemae.data.report import write_report

        write_report(store)
    except Exception as error:  # a picture must not fail a night's work
        print(f"warning: {PAGES[0]} could not be made ({error!r}); the store is complete")
    else:
        print(f"look at {store / PAGES[0]}")


def _spacing(text: str) -> list[float] | float | None:
    if text == "keep":
        return None
    numbers = _numbers(text)
    if len(numbers) not in (1, 3) or not all(0 < n < math.inf for n in numbers):
        raise UserError(
            f"--spacing {text}: give one positive number of mm, three as x,y,z, or keep"
        )
    return numbers if len(numbers) == 3 else numbers[0]


def _window(text: str) -> list[float]:
    numbers = _numbers(text)
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"--window {text}: give two numbers of HU, low,high, the lower one first")
    return numbers


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard {text}: give i/n, such as 0/8 for the first of eight")
    return Shard(int(index), int(count))
