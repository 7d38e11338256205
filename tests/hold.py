"""Makes a process of `sparsemae` stand still at a named place, so that a test can stop it there.

A test that only waits and looks comes too late on a busy machine; a process that waits for the test
does not run away. Places:

recorded: after the outcome of a volume was recorded
looking, preparing: before a case of a data set is looked at, prepared
stored: after a file of a prepared case was written
step: after a step was logged and shown
validation, report: before one is made
model, optimizer, ema, meta: when that file of a checkpoint is half written
commit: when all of a checkpoint is written, but has not its name yet
removal: when a checkpoint has lost its name, but is not removed

As a script, FOLDER PLACE N WORDS..., it runs `sparsemae WORDS` so: while FOLDER/<its pid> exists.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from sparsemae import cli


def hold_at(place, numbers, held):
    """Stand still there while there is a file `held`, at these of the times it is reached.

    numbers: Counted from 0; several like "1,8".
    """
    times, count = {int(number) for number in str(numbers).split(",")}, 0

    def at(here):
        nonlocal count
        if here == place:
            count += 1
            if count - 1 in times:
                held.touch()
                while held.exists():
                    time.sleep(0.002)

    if place == "recorded":
        of_volumes(at)
    else:
        of_runs(at)
        of_checkpoints(place, at)


# each imports what it changes, as that may be seconds


def of_volumes(at):
    from sparsemae.data.making.ledger import Ledger

    Ledger.append = after(Ledger.append, lambda: at("recorded"))


def of_runs(at):
    from sparsemae import report
    from sparsemae.finetuning.objective import Segmentation
    from sparsemae.planning import fingerprint
    from sparsemae.pretraining.objective import Objective
    from sparsemae.segmentation import making, store
    from sparsemae.training.keeper import Keeper

    fingerprint.read_case = before(fingerprint.read_case, lambda: at("looking"))
    making.write_case = before(making.write_case, lambda: at("preparing"))
    store.write_array = after(store.write_array, lambda: at("stored"))
    Keeper.on_step = after(Keeper.on_step, lambda: at("step"))
    for kind in (Objective, Segmentation):
        kind.validate = before(kind.validate, lambda: at("validation"))
    report.write_run_report = before(report.write_run_report, lambda: at("report"))


def of_checkpoints(place, at):
    from sparsemae import checkpoint

    write, sync, remove = checkpoint.write_synced, checkpoint.sync_folder, shutil.rmtree

    def write_halves(path, data):
        if path.stem == place:
            path.write_bytes(data[: len(data) // 2])
            at(place)
        write(path, data)

    def sync_and_commit(path):
        sync(path)
        if path.name.startswith(".tmp-"):
            at("commit")

    def remove_named(path, *arguments, **options):
        if Path(path).name.startswith(".del-") and Path(path).exists():
            at("removal")
        remove(path, *arguments, **options)

    checkpoint.write_synced, checkpoint.sync_folder = write_halves, sync_and_commit
    shutil.rmtree = remove_named


def before(work, do):
    def call(*arguments, **options):
        do()
        return work(*arguments, **options)

    return call


def after(work, do):
    def call(*arguments, **options):
        found = work(*arguments, **options)
        do()
        return found

    return call


if __name__ == "__main__":
    hold_at(sys.argv[2], sys.argv[3], Path(sys.argv[1], str(os.getpid())))
    sys.argv = ["sparsemae", *sys.argv[4:]]
    cli.main()
