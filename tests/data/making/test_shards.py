"""Several runs at one store: shards that share it, a merge at the end, and others kept out."""

import json
import threading

import pytest

from sparsemae.data.making.workers import Lost
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preprocess import Shard, preprocess
from sparsemae.errors import UserError


def rejected(store):
    return [json.loads(line)["id"] for line in (store / "failures.jsonl").read_text().splitlines()]


def test_shards_together_are_the_whole(volumes, tmp_path, contents):
    source, store = volumes(11), tmp_path / "shards"
    (source / "v004.nii.gz").write_bytes(b"")
    preprocess([source], tmp_path / "whole")
    counts = []
    for i in (2, 0):
        summary = preprocess([source], store, shard=Shard(i, 3))
        assert summary.store is None
        counts.append(summary.progress.total)
        assert not (store / "index.json").exists()
    with pytest.raises(UserError, match=r"\d of 11 volumes are not done, the first is .*v0"):
        preprocess([source], store, merge=True)
    counts.append(preprocess([source], store, shard=Shard(1, 3)).progress.total)
    assert sum(counts) == 11
    assert min(counts) > 0
    again = preprocess([source], store, shard=Shard(1, 3))
    assert again.progress.kept == counts[-1]
    merged = preprocess([source], store, merge=True)
    assert (merged.progress.ok, merged.progress.rejected, merged.progress.kept) == (10, 1, 11)
    assert contents(store) == contents(tmp_path / "whole")
    assert rejected(store) == ["v004"]


def test_two_runs_in_one_store(volumes, tmp_path):
    source, store = volumes(3), tmp_path / "store"

    def intrude(progress, outcome):
        with pytest.raises(UserError, match="another run is at work"):
            preprocess([source], store)
        with pytest.raises(UserError, match="another run is at work"):
            preprocess([source], store, shard=Shard(0, 2))

    assert preprocess([source], store, on_outcome=intrude).progress.ok == 3

    def join(progress, outcome):
        with pytest.raises(UserError, match="another run is at work"):
            preprocess([source], store, shard=Shard(0, 2), overwrite=False)
        if outcome is None:
            preprocess([source], store, shard=Shard(1, 2))

    (source / "v000.nii.gz").touch()
    preprocess([source], store, shard=Shard(0, 2), on_outcome=join)


def test_a_result_stands_against_a_failure_of_the_machine(volumes, tmp_path, monkeypatch):
    """Whichever journal says so: they have no order among them."""
    source, store = volumes(5), tmp_path / "store"

    def lose(function, jobs, *args, **kwargs):
        for job in jobs:
            yield job, Lost("worker.timeout", "no answer within 1 s", 1.0)

    monkeypatch.setattr("sparsemae.data.preprocess.run_jobs", lose)
    with pytest.raises(UserError, match="none of the 5"):
        preprocess([source], store)  # its journal stays
    preprocess([source], store, shard=Shard(0, 1))
    monkeypatch.undo()
    assert preprocess([source], store, shard=Shard(1, 2)).progress.ok > 0
    assert preprocess([source], store, shard=Shard(0, 2)).progress.ok > 0
    summary = preprocess([source], store, merge=True)
    assert (summary.progress.ok, summary.failures) == (5, ())


def test_shards_that_begin_together_agree_on_the_options(volumes, tmp_path):
    source, ready, outcomes = volumes(1), threading.Barrier(6), []

    def run(i):
        config = PreprocessConfig(spacing=2.0 if i % 2 else 3.0)
        ready.wait()
        try:
            preprocess([source], tmp_path / "store", config, shard=Shard(i, 6))
        except UserError as error:
            outcomes.append((config.spacing, str(error)))
        else:
            outcomes.append((config.spacing, ""))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 6
    accepted = {spacing for spacing, error in outcomes if not error}
    assert len(accepted) == 1
    assert all("other options" in error for spacing, error in outcomes if spacing not in accepted)
