"""A suite of two small data sets and two methods, and a stand-in for the commands it runs."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from sparsemae.comparison.jobs import grid
from sparsemae.comparison.suite import read_suite
from sparsemae.evaluation.metrics import Score
from sparsemae.evaluation.summary import RECORD, CaseScores, ScoredClass, Summary, write_summary

STAND_IN = """
    import json, pathlib, signal, sys, time

    here, words = pathlib.Path(__file__).parent, sys.argv[1:]
    stage, output = words[0], pathlib.Path(words[words.index("-o") + 1])
    parts = output.parts
    job = next(parts[i + 1:i + 4] for i, p in enumerate(parts) if p in ("runs", "jobs"))
    job = "/".join(job)
    with (here / "calls.txt").open("a") as file:
        file.write(json.dumps([job, *words]) + "\\n")
    plan = json.loads((here / "plan.json").read_text())
    if f"{job}:{stage}" in plan.get("hang", []):
        def stop(*event):
            (here / "signalled").touch()
            print("stopped at step 3 as asked", flush=True)
            sys.exit(85)
        signal.signal(signal.SIGTERM, stop)
        (here / "hanging").touch()
        time.sleep(60)
    if f"{job}:{stage}" in plan.get("fail", []):
        print("sparsemae: error: out of luck", file=sys.stderr)
        sys.exit(1)
    output.mkdir(parents=True, exist_ok=True)
    if stage == "evaluate":
        dataset, method, run = job.split("/")
        if job not in plan.get("nothing", []):
            (output / "metrics.json").write_bytes((here / method / "metrics.json").read_bytes())
"""

SUITE = """
    [suite]
    name = "heads"
    folds = [0]
    seeds = [0, 1]

    [[datasets]]
    name = "stroke"
    path = "data/Dataset001_Stroke"
    role = "development"

    [[datasets]]
    name = "tumour"
    path = "data/Dataset002_Tumour"
    role = "test"
    evaluate_on = "test"
    folds = [1]

    [[methods]]
    name = "scratch"
    init = "none"

    [[methods]]
    name = "mae"
    init = "pretrained"
    config = "fast.toml"
    set = ["train.steps=10", "data.batch_size=2"]
"""


def write_dice(folder: Path, cases: dict[str, tuple[float, ...]]) -> Path:
    """The record of an evaluation with the Dice of every class, by case."""
    (classes,) = {len(values) for values in cases.values()}
    other = {"nsd": 0.1, "hd95": 2.0, "prediction_ml": 1.0, "reference_ml": 1.0}
    summary = Summary(
        classes=tuple(
            ScoredClass(label=i, name=f"class{i}", tolerance_mm=1.0) for i in range(1, classes + 1)
        ),
        ignore=None,
        cases=tuple(
            CaseScores(
                case=case,
                scores=tuple(
                    Score(label=i, dice=dice, **other) for i, dice in enumerate(values, start=1)
                ),
            )
            for case, values in cases.items()
        ),
    )
    write_summary(summary, folder)
    return folder / RECORD


def make_dataset(path: Path, cases: int = 3) -> None:
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (path / folder).mkdir(parents=True)
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}}
    about |= {"numTraining": cases, "file_ending": ".nii.gz"}
    (path / "dataset.json").write_text(json.dumps(about))
    for i in range(cases):
        (path / "imagesTr" / f"case{i}_0000.nii.gz").touch()
        (path / "labelsTr" / f"case{i}.nii.gz").touch()


@pytest.fixture
def suite_file(tmp_path):
    """Four jobs on one data set, and four on the other."""
    for name in ("Dataset001_Stroke", "Dataset002_Tumour"):
        make_dataset(tmp_path / "data" / name)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "fast.toml").write_text("seed = 0\n")
    file = tmp_path / "suite.toml"
    file.write_text(textwrap.dedent(SUITE))
    return file


@pytest.fixture(name="write_dice")
def write_dice_fixture():
    return write_dice


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def jobs(suite_file, output):
    return grid(read_suite(suite_file), output)


class StandIn:
    """Does as `plan` says, and notes how it was called."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "sparsemae.py").write_text(textwrap.dedent(STAND_IN))
        self.plan()

    @property
    def program(self) -> tuple[str, ...]:
        return sys.executable, "-S", str(self.folder / "sparsemae.py")

    def plan(self, **plan) -> None:
        for method in ("scratch", "mae", "again"):
            base = 0.5 + plan.get("gain", {}).get(method, 0.0)
            cases = {f"case{i}": (base + 0.01 * i,) for i in range(6)}
            write_dice(self.folder / method, cases)
        (self.folder / "plan.json").write_text(json.dumps(plan))

    @property
    def calls(self) -> list[list[str]]:
        """The job and the words of every call, so far."""
        log = self.folder / "calls.txt"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def forget(self) -> None:
        (self.folder / "calls.txt").unlink(missing_ok=True)


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path / "stand-in")
