"""The rows of the data benchmark as tables."""

from collections.abc import Iterator, Sequence

from sparsemae.bench.data import Row

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], int]

PLAIN = {"": "none", "drawn": "as drawn in training", "all resampled": "every patch resampled"}


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Title, header, lines and number of columns of words, for each part that has rows."""
    for case, table in (
        ("preprocess", _preprocess),
        ("read", _read),
        ("augment", _augment),
        ("wait", _wait),
    ):
        if some := [row for row in rows if row["case"] == case]:
            yield table(some)


def _preprocess(rows: Sequence[Row]) -> Table:
    header = ("source", "s", "a minute", "MB in", "MB stored", "volumes", "core h", "GB in")
    lines = [
        (
            *(row["source"], f"{row['seconds_per_volume']:.2f}"),
            *(f"{row['volumes_per_minute_core']:.1f}", f"{row['mb_source']:.1f}"),
            *(f"{row['mb_stored']:.1f}", f"{row['scale_volumes']}"),
            *(f"{row['scale_core_hours']:.0f}", f"{row['scale_gb_source']:.0f}"),
            f"{row['scale_gb_stored']:.0f}",
        )
        for row in rows
    ]
    return "preprocessing a volume with one process", (*header, "GB stored"), lines, 1


def _read(rows: Sequence[Row]) -> Table:
    header = ("form", "resampling", "patch", "cache", "patches/s", "ms", "20 - 80 %")
    lines = []
    for row in rows:
        words = (row["form"], PLAIN[row["augment"]], f"{row['patch']}^3", row["cache"])
        if row["skipped"]:
            lines.append((*words, row["skipped"], "", "", "", "", ""))
            continue
        lines.append(
            (
                *(*words, f"{row['patches_per_second']:.1f}", f"{row['ms']:.2f}"),
                *(_spread(row), f"{row['ratio_nnunet']:.2f}x", f"{row['ratio_nibabel']:.1f}x"),
                f"{row['mb_file']:.1f}",
            )
        )
    header = (*header, "of nnU-Net", "of nibabel", "MB a case")
    return "reading patches with one process", header, lines, 2


def _augment(rows: Sequence[Row]) -> Table:
    lines = [
        (
            *(PLAIN[row["augment"]], f"{row['patch']}^3", str(row["batch"])),
            *(f"{row['ms_mean']:.2f}", f"{row['ms']:.2f}", _spread(row)),
        )
        for row in rows
    ]
    header = ("resampling", "patch", "batch", "mean ms", "median", "20 - 80 %")
    return "a batch of patches on the device", header, lines, 1


def _wait(rows: Sequence[Row]) -> Table:
    lines = [
        (
            *(f"ResEnc-{row['preset']}", f"{row['patch']}^3", str(row["batch"])),
            *(str(row["workers"]), f"{row['step_seconds']:.2f}"),
            *(f"{1e3 * row['wait_seconds']:.1f}", f"{row['wait_share']:.2%}"),
        )
        for row in rows
    ]
    header = ("network", "patch", "batch", "workers", "step s", "waiting ms", "share")
    return "what a training step waits for data", header, lines, 1


def _spread(row: Row) -> str:
    return f"{row['ms_p20']:.2f} - {row['ms_p80']:.2f}"
