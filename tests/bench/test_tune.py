"""The tuner picks the fastest right tile and writes a table that kernels read."""

import pytest
import torch
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench import tune
from sparsemae.bench.cases import Selection
from sparsemae.bench.timing import Spread
from sparsemae.errors import UserError
from sparsemae.kernels import tiles
from sparsemae.kernels.tiles import Tile

pytest.importorskip("triton")
CPU = torch.device("cpu")
SMALL = Selection(16, (8,), (1,), (0.5,), ("fwd", "dgrad", "wgrad"), ("down2",), "float32", "tiny")


def clock(milliseconds):
    """A timer that runs nothing and reads each form's time from a function."""

    def timer(runs, device, seconds):
        return {form: Spread(*(milliseconds(form),) * 3, 1) for form in runs}

    return timer


@pytest.fixture
def target():
    kinds = {t.key[0]: t for t in tune.targets(SMALL, CPU)}
    assert set(kinds) == {"gather", "spread", "wgrad"}
    return kinds["gather"]


FORMS = [Tile(16, 16, 16), Tile(32, 16, 16), Tile(64, 16, 16)]


def test_the_fastest_candidate_wins(target):
    speeds = {None: 2.0, FORMS[0]: 3.0, FORMS[1]: 1.0, FORMS[2]: 1.5}
    found = tune.tune(target, CPU, 0, timer=clock(speeds.get), pool=lambda key: FORMS)
    assert (found.tile, found.ms, found.best_ms, found.tried) == (FORMS[1], 2.0, 1.0, 3)


def test_a_little_faster_is_noise(target):
    found = tune.tune(
        target, CPU, 0, timer=clock(lambda form: 1.0 if form else 1.02), pool=lambda key: FORMS
    )
    assert found.tile is None


def test_a_wrong_candidate_is_not_timed(target, monkeypatch):
    right = target.run
    spoiled = tune.Target(
        target.key,
        lambda: tuple(t * (2 if _rows(target.key) == 16 else 1) for t in right()),
        target.name,
    )
    found = tune.tune(spoiled, CPU, 0, timer=clock(lambda form: 1.0), pool=lambda key: FORMS)
    assert found.tried == 2


def _rows(key) -> int:
    entry = tiles._table.get().get(key)
    return entry.rows if entry else 0


def test_every_target_once_and_later_ones_use_what_was_found():
    seen = []

    def pool(key):
        seen.append((key, dict(tiles._table.get())))
        return FORMS[:1]

    speeds = clock(lambda form: 1.0 if form else 2.0)
    outcomes = tune.tune_all(SMALL, CPU, 0, 1e9, timer=speeds, pool=pool)
    keys = [key for key, _ in seen]
    assert len(keys) == len(set(keys)) == len(outcomes)
    assert seen[-1][1][keys[0]] == FORMS[0]
    assert tune.tune_all(SMALL, CPU, 0, -1.0, timer=speeds, pool=pool) == []


def test_the_table_is_merged(tmp_path):
    path = tmp_path / "tiles.toml"
    old = ("gather", "sm_80", 16, 8, 8, 4)
    path.write_text(tune.HEADER + '[[tile]]\nkernel = "gather"\nchip = "sm_80"\nbits = 16\nk = 8\n'
                    "n = 8\nwidth = 4\nrows = 64\ncols = 16\ndepth = 16\n")  # fmt: skip
    new = ("march", "sm_90", 16, 32, 32, 16)
    outcomes = [
        tune.Outcome(tune.Target(new, tuple, ""), 2.0, 1.0, Tile(64, 32, 32, resident=True), 1),
        tune.Outcome(tune.Target(("gather", *new[1:]), tuple, ""), 2.0, 2.0, None, 1),
    ]
    assert tune.merge(path, outcomes) == 1
    assert tiles.read(path.read_text()) == {
        old: Tile(64, 16, 16),
        new: Tile(64, 32, 32, resident=True),
    }


def test_the_shipped_table_is_as_the_tuner_writes_it(tmp_path):
    shipped = tune.SHIPPED.read_text()
    (tmp_path / "tiles.toml").write_text(shipped)
    tune.merge(tmp_path / "tiles.toml", [])
    assert (tmp_path / "tiles.toml").read_text() == shipped


@pytest.mark.parametrize("kernel", ["march", "gather", "spread", "wgrad"])
@pytest.mark.parametrize(("k", "n", "bits"), [(32, 32, 16), (320, 320, 16), (1, 32, 32)])
def test_candidates(kernel, k, n, bits):
    pool = tune.candidates((kernel, "sm_90", bits, k, n, 4))
    assert len(pool) == len(set(pool)) > 3
    for form in pool:
        for number in (form.rows, form.cols, form.depth):
            assert number & (number - 1) == 0
    assert (tune.NO_MARCH in pool) == (kernel == "march")


def test_tiles_are_not_tuned_on_a_cpu():
    result = CliRunner().invoke(command.app, ["tune", "--device", "cpu"])
    assert isinstance(result.exception, UserError)
    assert "--device cpu: tiles are chosen on the GPU they are for" in str(result.exception)
