"""Work beside the training: one job at a time, and no failure gets lost."""

import threading

import pytest

from sparsemae.training.background import Background


def test_jobs_run_one_after_the_other_beside_the_caller():
    background, order, go = Background(), [], threading.Event()
    background.start(lambda: (go.wait(10), order.append("first")))
    order.append("caller")
    go.set()
    background.start(lambda: order.append("second"))
    background.wait()
    background.wait()
    assert order == ["caller", "first", "second"]


@pytest.mark.parametrize("how", ["wait", "start"])
def test_a_failure_is_raised_once_by_the_next_call(how):
    background, ran = Background(), []
    background.start(lambda: 1 / 0)
    background._thread.join()
    assert background.failed
    with pytest.raises(ZeroDivisionError):
        background.wait() if how == "wait" else background.start(lambda: ran.append(1))
    assert not ran
    assert not background.failed
    background.wait()
