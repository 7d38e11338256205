"""What a person sees: a table in a terminal, whole lines elsewhere."""

import io

import pytest
from rich.console import Console

from sparsemae.training.loop import StepRecord
from sparsemae.training.progress import TrainingProgress


def record(step, **changes):
    usual = {"loss": 0.5, "lr": 1e-2, "grad_norm": 3.21, "skipped": False, "spike": False}
    times = {"seconds": 0.5, "wait_seconds": 0.05, "samples": 6, "memory": 3 * 2**30}
    return StepRecord(step=step, **{**usual, **times, **changes})


def shown(*records, terminal, width=200, then=None, code=0):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    with TrainingProgress(100, 0, console, stop=lambda: code) as progress:
        for item in records:
            progress.update(item)
        if then:
            then(progress)
    return console.file.getvalue()


def test_a_terminal_gets_everything_at_once():
    def then(progress):
        progress.validated(40, 0.25)
        progress.saved(40)

    text = shown(record(39), record(40, loss=0.7, skipped=False), terminal=True, then=then)
    for name in ("last loss", "validation", "lr", "grad", "samples/s", "data wait", "GPU memory"):
        assert name in text
    for value in ("0.5200", "0.7000", "0.2500", "1.00e-02", "3.21", "12.00", "10%", "3.0 GiB"):
        assert value in text
    assert "step 40" in text
    assert "40/100" in text
    assert "checkpoint" in text
    assert "left" in text


def test_a_narrow_terminal_loses_nothing():
    text = shown(record(40), terminal=True, width=40)
    assert "GPU memory" in text
    assert "data wait" in text


def test_elsewhere_lines_are_seconds_apart_and_the_last_is_printed():
    lines = shown(*(record(step) for step in range(1, 101)), terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    assert "GPU memory 3.0 GiB" in lines[0]
    assert "skipped" not in lines[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_that_were_left_out_are_counted_and_not_averaged(terminal):
    nan = float("nan")
    records = [record(99), record(100, loss=nan, grad_norm=nan, skipped=True)]
    text = shown(*records, terminal=terminal)
    assert "0.5000" in text
    assert "skipped" in text


def test_before_any_finite_loss_it_says_so():
    text = shown(record(100, loss=float("nan"), skipped=True), terminal=False)
    assert "loss not finite" in text


@pytest.mark.parametrize("code", [0, 85, 130])
def test_who_asked_it_to_stop_is_told_what_it_waits_for(code):
    text = shown(record(40), terminal=True, code=code)
    assert ("stopping after this step and a checkpoint" in text) == (code > 0)
    assert ("Ctrl-C again stops at once" in text) == (code == 130)
