"""What predictions a folder holds: which weights made them, of which files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemae.errors import UserError
from sparsemae.files import write_atomically
from sparsemae.segmentation.dataset import PROBABILITIES, SegCase
from sparsemae.segmentation.making import stamp_of_case

RECORD, FORMAT = "predict.json", 1
LABELS, OVERLAY = ".nii.gz", ".png"
PROBABILITY_MAPS = f"{PROBABILITIES}{LABELS}"


@dataclass
class Record:
    """`predict.json` of a folder of predictions."""

    folder: Path
    facts: dict[str, Any]  # weights, options, channels and classes
    cases: dict[str, str] = field(default_factory=dict)  # what was made, and of which files

    @classmethod
    def claim(cls, folder: Path, facts: dict[str, Any], *, overwrite: bool) -> "Record":
        """Make the folder, or go on in it if the same weights and options made what is there.

        Args:
            overwrite: Remove what a record says was predicted there, and begin anew.

        Raises:
            UserError: It holds anything else.
        """
        facts = json.loads(json.dumps({"format": FORMAT, **facts}))
        if folder.exists() and not folder.is_dir():
            raise UserError(f"-o {folder}: a file; choose another -o")
        record = cls(folder, facts)
        if folder.is_dir() and any(folder.iterdir()):
            try:
                before = json.loads((folder / RECORD).read_text())
                cases = dict(before.pop("cases"))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"-o {folder}: holds files that are no predictions; choose another -o"
                ) from None
            if before != facts and not overwrite:
                raise UserError(
                    f"-o {folder}: holds predictions by other weights or options; choose another "
                    f"-o, or --overwrite to replace them"
                )
            for case in cases if overwrite else ():
                for ending in (LABELS, PROBABILITY_MAPS, OVERLAY):
                    (folder / f"{case}{ending}").unlink(missing_ok=True)
            record.cases = {} if overwrite else cases
        folder.mkdir(parents=True, exist_ok=True)
        record._write()
        return record

    def holds(self, case: SegCase) -> bool:
        """Whether the case was predicted from the files it has now."""
        return self.cases.get(case.id) == stamp_of_case(case)

    def add(self, case: SegCase) -> None:
        """Note that a case has been predicted."""
        self.cases[case.id] = stamp_of_case(case)
        self._write()

    def _write(self) -> None:
        text = json.dumps({**self.facts, "cases": self.cases}, indent=1)
        write_atomically(self.folder / RECORD, text.encode())
