"""A run: the loop with everything around it that must survive crashes, schedulers and full disks.

Only rank 0 touches the folder. What goes wrong there stops all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sparsemae.signals import PREEMPTED
from sparsemae.training.exactness import make_deterministic
from sparsemae.training.guard import LossScale
from sparsemae.training.keeper import Keeper
from sparsemae.training.loop import State, fit
from sparsemae.training.optimizer import Ema, make_optimizer
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks, lost_ranks_explained
from sparsemae.training.task import Task


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail."""

    checkpoint: Path  # the newest
    step: int
    exit_code: int  # 0: finished; else stopped as asked, `--resume` goes on


def run_task(
    task: Task,
    run: Path,
    config: TrainConfig,
    *,
    seed: int,
    ranks: Ranks,
    console: Console,
    stop: Callable[[], int],
) -> Outcome:
    """Train `task` in the claimed folder `run`, from its newest checkpoint if it has any.

    Args:
        stop: Asked in every step: 0, or the exit code of a run that was stopped.

    Raises:
        UserError: The checkpoints are of another run, or not usable.
        OSError: The folder cannot be written.
        DivergedError, LoaderError, OutOfMemoryError: See `fit`. All are in status.json.
    """
    if config.deterministic:
        make_deterministic(ranks.device)
    state = State(
        task.model,
        make_optimizer(task.groups, config),
        Ema(task.model, config.ema) if config.ema is not None else None,
        scale=LossScale.of(config.precision),
    )
    with Keeper(task, run, config, ranks, console) as keeper:
        with lost_ranks_explained(ranks):
            keeper.restore(state)
        try:
            with lost_ranks_explained(ranks):
                ranks.shared(lambda: keeper.open(state, stop))
                finished = fit(
                    *(state, task.loss_of, task.batches(state.step), config),
                    ranks=ranks,
                    on_step=keeper.on_step,
                    save=keeper.save,
                    stop=lambda: keeper.must_stop() or stop() > 0,
                    seed=seed,
                )
            code = 0 if finished else stop() or PREEMPTED
            path = keeper.end(state, code)
        except BaseException as error:
            keeper.failed(state, error)
            raise
    return Outcome(path, state.step, code)
