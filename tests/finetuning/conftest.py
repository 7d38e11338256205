"""Runs of `sparsemae finetune` that vary a lot; tests/conftest.py starts and stops them."""

import json

import pytest

# everything that a step's outcome depends on is switched on; the schedule is sawtooth
VARIED = {
    "data.augmentation": "plain", "data.rotation_probability": 0.7, "data.scale_probability": 0.7,
    "data.validation": 2, "data.workers": 0, "train.steps": 12, "train.save_every": 3,
    "train.warmup": 2, "train.lr": 1e-2, "train.ema": 0.8, "train.precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="session")
def start(tmp_path_factory, sparsemae_now, labelled, small_plans):
    """A run whose weights fit the network of the plan, and are not those of a fresh one."""
    run = tmp_path_factory.mktemp("start") / "run"
    values = VARIED | {"seed": 5, "train.steps": 1, "train.warmup": 0, "train.ema": 0.5}
    sets = [f"--set={k}={v}" for k, v in values.items()]
    plan = f"--set=plan.file={json.dumps(str(small_plans))}"
    done = sparsemae_now("finetune", labelled, "-o", run, "--init", "none", plan, *sets)
    assert done.wait() == 0, done.printed
    return run


@pytest.fixture(scope="session")
def varied(labelled, small_plans, start):
    """`varied(run, key=value)`: the words that start, or go on with, a run that varies a lot.

    store: where prepared cases are kept; in the run if None. plans: another plans.json.
    """

    def words(run, *, store=None, plans=small_plans, **changes):
        values = VARIED | {key.replace("__", "."): value for key, value in changes.items()}
        sets = [f"--set={k}={str(v).lower()}" for k, v in values.items()]
        sets.append(f"--set=plan.file={json.dumps(str(plans))}")
        kept = [] if store is None else ["--store", store]
        return ["finetune", labelled, "-o", run, "--init", start, *kept, "--resume", *sets]

    return words


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, sparsemae_now, varied):
    """The folder of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sparsemae_now(*varied(run))
    assert done.wait() == 0, done.printed
    return run


@pytest.fixture(scope="session")
def as_undisturbed(undisturbed, run_bytes):
    """`as_undisturbed(run)`: the names of its files that differ from the undisturbed run's.

    The number of loader workers may.
    """

    def compare(run):
        found, expected = run_bytes(run), run_bytes(undisturbed)
        found["config.toml"] = found["config.toml"].replace(b"workers = 2", b"workers = 0")
        return sorted(k for k in found.keys() | expected if found.get(k) != expected.get(k))

    return compare
