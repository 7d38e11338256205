"""Lines of a run: cut back to a checkpoint, whole or not at all."""

import json
import math

import pytest

from sparsemae.training.logs import HISTORY, METRICS, TIMING, RunLog, has_steps, note
from sparsemae.training.loop import StepRecord


def record(step, **changes):
    usual = {"loss": 0.1 * step, "lr": 1e-3, "grad_norm": 2.0, "skipped": False, "spike": False}
    times = {"seconds": 0.5, "wait_seconds": 0.1, "samples": 4, "memory": None}
    return StepRecord(step=step, **{**usual, **times, **changes})


def write(run, first, last, **changes):
    with RunLog(run, first - 1, lambda step: [f"case {step}"], tensorboard=False) as log:
        for step in range(first, last + 1):
            log.step(record(step, **changes))
        log.sync()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_a_line_of_numbers_and_a_line_of_times(tmp_path):
    write(tmp_path, 1, 2)
    metrics, timing = lines(tmp_path / METRICS), lines(tmp_path / TIMING)
    assert metrics[0] == {"step": 1, "loss": 0.1, "lr": 1e-3, "grad_norm": 2.0}
    assert timing[1].pop("time") > 1.7e9
    assert timing[1] == {
        "step": 2, "seconds": 0.5, "wait_seconds": 0.1, "samples": 4, "memory_bytes": None
    }  # fmt: skip


def test_what_went_wrong_names_the_cases_and_is_valid_json(tmp_path):
    write(tmp_path, 1, 1, skipped=True, loss=math.nan, grad_norm=math.inf)
    write(tmp_path, 2, 2, spike=True)
    bad, spike = lines(tmp_path / METRICS)
    assert bad == {
        "step": 1, "loss": None, "lr": 1e-3, "grad_norm": None, "skipped": True, "cases": ["case 0"]
    }  # fmt: skip
    assert (spike["spike"], spike["cases"]) == (True, ["case 1"])
    assert "NaN" not in (tmp_path / METRICS).read_text()


@pytest.mark.parametrize(
    "tail", ["", '{"step": 6, "lo', '{"step": 6}', "\x00\x00\n", "[1]\n", "\n"]
)
def test_lines_after_the_checkpoint_and_broken_ones_are_cut(tmp_path, tail):
    write(tmp_path, 1, 5)
    first = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    for name in (METRICS, TIMING):
        with (tmp_path / name).open("a") as file:
            file.write(tail)
    write(tmp_path, 4, 3)  # opened at step 3, nothing written
    assert (tmp_path / METRICS).read_bytes() == b"".join(first[:3])
    assert [line["step"] for line in lines(tmp_path / TIMING)] == [1, 2, 3]
    write(tmp_path, 4, 5)
    assert (tmp_path / METRICS).read_bytes() == b"".join(first)


def test_validation_and_saves_are_lines_of_their_own(tmp_path):
    with RunLog(tmp_path, 0, lambda step: [], tensorboard=False) as log:
        log.step(record(1))
        log.validation(1, 0.25)
        log.took(1, {"save_seconds": 0.125})
    assert lines(tmp_path / METRICS)[1] == {"step": 1, "val_loss": 0.25}
    assert lines(tmp_path / TIMING)[1]["save_seconds"] == 0.125


def test_history_is_never_cut(tmp_path):
    note(tmp_path, 5, "started")
    note(tmp_path, 3, "warning", "a reason")
    write(tmp_path, 1, 2)
    assert [(e["step"], e["event"], e["message"]) for e in lines(tmp_path / HISTORY)] == [
        (5, "started", ""),
        (3, "warning", "a reason"),
    ]


def test_whether_a_run_has_steps(tmp_path):
    assert not has_steps(tmp_path)
    (tmp_path / METRICS).write_text('{"step": 1, "lo')
    assert not has_steps(tmp_path)
    write(tmp_path, 1, 1)
    assert has_steps(tmp_path)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 4), (3, 5)):  # resumed at step 2
        with RunLog(tmp_path, first - 1, lambda step: [], tensorboard=True) as log:
            for step in range(first, last + 1):
                log.step(record(step, loss=math.nan if step == 2 else 0.5 * step))
            log.validation(last, 0.25)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss", "lr", "grad_norm", "samples_per_second", "val_loss"
    }  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 0.5), (3, 1.5), (4, 2.0), (5, 2.5)
    ]  # fmt: skip
