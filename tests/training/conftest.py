"""Runs of `sparsemae pretrain` that vary a lot; tests/conftest.py starts and stops them."""

import pytest

# everything that a step's outcome depends on is switched on
VARIED = {
    "data.patch_size": 16, "data.batch_size": 2, "data.validation": 2, "data.foreground": 0.5,
    "data.rotation_probability": 0.5, "data.scale_probability": 0.5, "mask.ratio": [0.4, 0.7],
    "train.steps": 24, "train.save_every": 4, "train.ema": 0.8, "train.optimizer": "sgd",
    "train.lr": 1e-3, "train.warmup": 3, "data.workers": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def varied(store):
    """`varied(run, key=value)`: the words that start, or go on with, a run that varies a lot."""

    def words(run, **changes):
        values = VARIED | {key.replace("__", "."): value for key, value in changes.items()}
        sets = [f"--set={k}={str(v).lower()}" for k, v in values.items()]
        return ["pretrain", store, "-o", run, "--config", "tiny", "--resume", *sets]

    return words


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, sparsemae_now, varied):
    """The folder of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sparsemae_now(*varied(run))
    assert done.wait() == 0, done.printed
    return run
