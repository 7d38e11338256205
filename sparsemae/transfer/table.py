"""What became of every part of a network that was given pre-trained weights."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"
LEAST = 0.5  # of the encoder's parameters, below which a transfer is useless


@dataclass
class Row:
    """One part: the stem, a stage of the encoder, a level of the decoder, the heads.

    Counts are [tensors, parameters].
    """

    part: str
    copied: list[int] = field(default_factory=lambda: [0, 0])
    adapted: list[int] = field(default_factory=lambda: [0, 0])
    fresh: list[int] = field(default_factory=lambda: [0, 0])
    remarks: list[str] = field(default_factory=list)  # what was adapted, or does not fit

    def count(self, what: str, tensors: int, parameters: int) -> None:
        counts = getattr(self, what)
        counts[0] += tensors
        counts[1] += parameters

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    @property
    def parameters(self) -> int:
        return self.copied[1] + self.adapted[1] + self.fresh[1]


@dataclass(frozen=True)
class TransferTable:
    """A transfer, part by part, finest first."""

    origin: Path
    rows: tuple[Row, ...]
    unused: tuple[str, ...]  # tensors of the source that found no place
    notes: tuple[str, ...] = ()  # what reading the source did with it

    def total(self, what: str) -> int:
        """Parameters copied, adapted or fresh."""
        return sum(getattr(row, what)[1] for row in self.rows)

    @property
    def encoder_share(self) -> float:
        """The share of the encoder's parameters that were copied or adapted."""
        rows = [row for row in self.rows if row.part.startswith(("stem", "encoder"))]
        return sum(r.copied[1] + r.adapted[1] for r in rows) / sum(r.parameters for r in rows)

    def summary(self) -> str:
        """One line."""
        parts = ", ".join(f"{self.total(w) / 1e6:.2f} M {w}" for w in (COPIED, ADAPTED, FRESH))
        unused = f"; {len(self.unused)} tensors unused" if self.unused else ""
        return f"parameters: {parts}; {self.encoder_share:.0%} of the encoder{unused}"

    def table(self) -> Table:
        """For rich: tensors and parameters of every part."""
        out = Table("part", box=None)
        for what in (COPIED, ADAPTED, FRESH):
            out.add_column(what, justify="right")
        out.add_column("")
        for row in self.rows:
            counts = (_shown(getattr(row, what)) for what in (COPIED, ADAPTED, FRESH))
            out.add_row(row.part, *counts, "; ".join(row.remarks))
        return out


def check_useful(table: TransferTable) -> None:
    """Raise a UserError if less than half of the encoder was copied or adapted."""
    if table.encoder_share >= LEAST:
        return
    misfits = [
        f"{row.part}: {'; '.join(row.remarks)}"
        for row in table.rows
        if row.part.startswith(("stem", "encoder")) and row.fresh[1] and row.remarks
    ]
    raise UserError(
        one_line(
            f"{table.origin}: only {table.encoder_share:.0%} of the encoder's weights fit this "
            f"network ({', '.join(misfits[:3])}): plan the data set like theirs (plan.mode "
            f"like_pretrained), or take other weights"
        )
    )


def _shown(counts: list[int]) -> str:
    tensors, parameters = counts
    return f"{tensors} ({parameters / 1e6:.2f} M)" if tensors else "-"
