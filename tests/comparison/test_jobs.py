"""The grid of jobs, their commands, and shares of them."""

import shlex

import pytest

from sparsemae.comparison.jobs import chosen, command_lines, commands
from sparsemae.errors import UserError


def by_id(jobs, name):
    return next(job for job in jobs if job.id == name)


def test_every_cell_of_the_grid_is_a_job(jobs):
    ids = [job.id for job in jobs]
    assert len(ids) == len(set(ids)) == 8
    assert set(ids) == {
        f"{dataset}/{method}/fold{fold}-seed{seed}"
        for dataset, fold in (("stroke", 0), ("tumour", 1))
        for method in ("scratch", "mae")
        for seed in (0, 1)
    }


def test_commands_on_the_cases_of_a_fold(jobs, tmp_path, output):
    job = by_id(jobs, "stroke/mae/fold0-seed1")
    data, own = tmp_path / "data" / "Dataset001_Stroke", output / "jobs" / job.id
    found = commands(job)
    assert list(found) == ["finetune", "predict", "evaluate"]
    assert found["finetune"] == shlex.split(
        f"finetune {data} -o {output}/runs/{job.id} --init {tmp_path}/pretrained --fold 0 "
        f"--config {tmp_path}/fast.toml --set seed=1 --set train.steps=10 --set data.batch_size=2 "
        f"--store {output}/stores/stroke --resume"
    )
    assert found["predict"] == shlex.split(
        f"predict {output}/runs/{job.id} --validation -o {own}/predictions"
    )
    assert found["evaluate"] == shlex.split(
        f"evaluate {own}/predictions {data}/labelsTr --labels {data}/dataset.json "
        f"--only-predicted -o {own}/evaluation"
    )


def test_commands_on_test_cases(jobs, tmp_path, output):
    job = by_id(jobs, "tumour/scratch/fold1-seed0")
    data, own = tmp_path / "data" / "Dataset002_Tumour", output / "jobs" / job.id
    found = commands(job)
    assert found["finetune"] == shlex.split(
        f"finetune {data} -o {output}/runs/{job.id} --init none --fold 1 --set seed=0 "
        f"--store {output}/stores/tumour --resume"
    )
    assert found["predict"] == shlex.split(
        f"predict {output}/runs/{job.id} {data}/imagesTs -o {own}/predictions"
    )
    assert found["evaluate"] == shlex.split(
        f"evaluate {own}/predictions {data}/labelsTs --labels {data}/dataset.json "
        f"-o {own}/evaluation"
    )


def test_shares_are_all_jobs_once(jobs):
    shares = [chosen(jobs, f"{i}/3") for i in range(3)]
    assert sorted(job.id for share in shares for job in share) == sorted(job.id for job in jobs)
    assert [len(share) for share in shares] == [3, 3, 2]
    assert chosen(jobs, None) == jobs
    assert chosen(jobs, "5/8") == [jobs[5]]
    assert chosen(jobs, "9/20") == []


@pytest.mark.parametrize("only", ["3/3", "1/0", "0/0"])
def test_no_such_part(jobs, only):
    with pytest.raises(UserError, match=f"--only {only}: parts are counted from 0"):
        chosen(jobs, only)


def test_no_such_job(jobs):
    with pytest.raises(UserError, match="such as stroke/mae/fold0-seed1"):
        chosen(jobs, "stroke/mae/fold0-seed7")


def test_a_line_runs_its_own_job(jobs, suite_file, output):
    lines = command_lines(jobs, ("python", "-m", "sparse mae")).splitlines()
    assert len(lines) == 8
    for line, job in zip(lines, jobs, strict=True):
        words = shlex.split(line)
        assert words[:5] == ["python", "-m", "sparse mae", "compare", str(suite_file)]
        assert words[5:] == ["-o", str(output), "--only", job.id]
        assert chosen(jobs, words[-1]) == [job]


def test_definitions_hold_what_decides_a_result(jobs, tmp_path):
    first, other = by_id(jobs, "stroke/mae/fold0-seed0"), by_id(jobs, "stroke/mae/fold0-seed1")
    before = first.definition
    assert before != other.definition
    assert before == first.definition
    (tmp_path / "fast.toml").write_text("seed = 0\n[train]\nsteps = 3\n")
    assert first.definition != before
