"""`sparsemae preprocess`: options to a configuration, the run and its progress, an exit code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsemae.config import apply_overrides, build_config
from sparsemae.data.ledger import FAILURES, PAGES, WARNINGS
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preprocess import Shard, Summary, preprocess
from sparsemae.data.watch import PreprocessProgress, describe
from sparsemae.errors import UserError
from sparsemae.signals import PREEMPTED, stop_requested

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
        "spacing": None if spacing == "keep" else _numbers("--spacing", spacing, (1, 3)),
        "normalization": normalization,
        "window": _numbers("--window", window, (2,)),
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
    **options: Any,
) -> int:
    """Run `preprocess`, say what came of it, and return the exit code."""
    console = Console()
    part = None if shard is None else _shard(shard)
    try:
        with stop_requested() as stopped, PreprocessProgress(console) as progress:
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
    return _report(summary, store, part)


def _report(summary: Summary, store: Path, part: Shard | None) -> int:
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
        if counts.warned:
            print(f"{counts.warned} with a warning, see {store / WARNINGS}")
        _draw(store)
    left_out = [
        f"{n} {what}"
        for n, what in ((counts.rejected, "rejected"), (counts.filtered, "filtered"))
        if n
    ]
    if not left_out:
        return 0
    print(f"{' and '.join(left_out)}, see {store / FAILURES}")
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


def _numbers(option: str, text: str, counts: tuple[int, ...]) -> list[float] | float:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        what = {(1, 3): "one number of mm, three as x,y,z, or keep", (2,): "two numbers, low,high"}
        raise UserError(f"{option} {text}: give {what[counts]}")
    return numbers if len(numbers) > 1 else numbers[0]


def _shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard {text}: give i/n, such as 0/8 for the first of eight")
    return Shard(int(index), int(count))
