"""Checkpoints: bit-equal round trips, and an older one survives whatever happens to the newest."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsemae import checkpoint as module
from sparsemae.checkpoint import (
    load_checkpoint,
    load_model,
    load_optimizer,
    model_tensors,
    take_snapshot,
    write_checkpoint,
)
from sparsemae.errors import DivergedError, UserError
from sparsemae.files import sealed
from sparsemae.models.resenc import ResEncUNet
from sparsemae.training.optimizer import make_optimizer
from sparsemae.training.options import TrainConfig

PLAN = {"features_per_stage": (2, 3), "strides": (1, 2), "n_blocks_per_stage": (1, 1)}


class Toy(nn.Module):
    """A layer under two names, a frozen one, and a buffer."""

    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(2, width)
        self.alias = self.layer
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("seen", torch.tensor(7))


def save_checkpoint(folder, step, model, optimizer, meta, *, keep, best=None, ema=None):
    """What a run does in two halves, the second beside the training."""
    snapshot = take_snapshot(step, model, optimizer, meta, ema=ema)
    return write_checkpoint(folder, snapshot, keep=keep, best=best)


def trained(optimizer="sgd", steps=3, model=None, **options):
    """A model and its optimiser after a few steps."""
    model = model or Toy()
    config = TrainConfig(steps=steps, optimizer=optimizer, **options)
    optimizer = make_optimizer({"all": model.parameters()}, config)
    for _ in range(steps):
        optimizer.zero_grad()
        model.layer(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_steps(folder, *steps, keep=9):
    """Checkpoints whose bias is the step."""
    model, optimizer = trained()
    for step in steps:
        with torch.no_grad():
            model.layer.bias.fill_(step)
        save_checkpoint(folder, step, model, optimizer, {}, keep=keep)
    return model, optimizer


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "adamw", "lr": 1e-3},
    ],
)
def test_round_trip_is_bit_equal_and_training_goes_on_alike(tmp_path, options):
    model, optimizer = trained(**options)
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"data": "x"}, keep=2)
    found, warnings = load_checkpoint(tmp_path)
    assert warnings == []
    assert (found.path, found.step, found.meta["data"]) == (path, 3, "x")

    torch.manual_seed(9)
    twin, twin_optimizer = trained(steps=1, **{**options, "lr": 1e-9})
    load_model(twin, found.model(), found.path)
    load_optimizer(twin, twin_optimizer, found.optimizer(), path)
    twin_optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        for (name, p), (_, q) in zip(
            model_tensors(model).items(), model_tensors(twin).items(), strict=True
        ):
            assert torch.equal(p, q), name
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            state, copied = optimizer.state.get(p, {}), twin_optimizer.state.get(q, {})
            assert {k for k, v in state.items() if v is not None} == set(copied)
            assert all(
                torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in copied.items()
            )
        x = torch.randn(4, 2)
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            m.layer(x).square().sum().backward()
            o.step()


def test_aliases_are_stored_once_and_come_back(tmp_path):
    network = ResEncUNet(1, 1, **PLAN)
    optimizer = make_optimizer({"all": network.parameters()}, TrainConfig(steps=1))
    path = save_checkpoint(tmp_path, 1, network, optimizer, {}, keep=2)
    unique = sum(p.numel() * 4 for p in network.parameters())
    header = 8 + 120 * len(list(network.parameters()))
    assert unique < (path / "model.safetensors").stat().st_size < unique + header
    twin = ResEncUNet(1, 1, **PLAN)
    load_model(twin, load_checkpoint(tmp_path)[0].model(), path)
    for key, tensor in twin.state_dict().items():  # every alias of it
        assert torch.equal(tensor, network.state_dict()[key]), key


def test_half_precision_and_channels_last_weights_come_back(tmp_path):
    model = nn.Conv3d(2, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    save_checkpoint(tmp_path, 1, model, torch.optim.SGD(model.parameters()), {}, keep=2)
    twin = nn.Conv3d(2, 4, 3, dtype=torch.bfloat16)
    load_model(twin, load_checkpoint(tmp_path)[0].model(), tmp_path)
    assert torch.equal(twin.weight, model.weight)


def test_the_newest_are_kept_and_a_copy_of_ones_own_is_left_alone(tmp_path):
    save_steps(tmp_path, 9)
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "step-00000009-best")
    save_steps(tmp_path, 10, 200, 3000, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000009-best",
        "step-00000200",
        "step-00003000",
    ]
    assert load_checkpoint(tmp_path)[0].step == 3000


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE = {
    "bit of the weights": (lambda p: flip_bit(p / "model.safetensors"), "model.safetensors is"),
    "bit of the optimiser": (lambda p: flip_bit(p / "optimizer.safetensors"), "optimizer.safe"),
    "cut by a byte": (truncate, "model.safetensors is damaged"),
    "emptied": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors is"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "incomplete"),
    "no meta": (lambda p: (p / "meta.json").unlink(), "incomplete"),
    "meta is half": (lambda p: (p / "meta.json").write_text('{"format": 2, "st'), "meta.json"),
    "meta is a list": (lambda p: (p / "meta.json").write_text("[1]"), "meta.json is damaged"),
    "meta lists files oddly": (
        lambda p: (p / "meta.json").write_text('{"format": 2, "files": []}'),
        "meta.json is damaged",
    ),
    "meta of another step": (
        lambda p: (p / "meta.json").write_text(
            (p / "meta.json").read_text().replace('"step": ', '"step": 1')
        ),
        "meta.json is damaged",
    ),
    "meta is binary": (lambda p: (p / "meta.json").write_bytes(b"\xff\x00\x80"), "meta.json is"),
    "meta lists no files": (
        lambda p: (p / "meta.json").write_text('{"format": 2, "step": 20, "files": {}}'),
        "meta.json is damaged",
    ),
    "from the future": (
        lambda p: (p / "meta.json").write_text(
            json.dumps(json.loads((p / "meta.json").read_text()) | {"format": 99})
        ),
        "format 99 is newer than this version",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_used_when_the_newest_is_damaged(tmp_path, damage):
    save_steps(tmp_path, 10, 20)
    harm, words = DAMAGE[damage]
    harm(tmp_path / "step-00000020")
    found, [warning] = load_checkpoint(tmp_path)
    assert found.step == 10
    assert (found.model()["layer.bias"] == 10).all()
    assert warning.startswith(f"{tmp_path / 'step-00000020'}: ")
    assert words in warning
    assert warning.endswith("; using the checkpoint before it")
    assert "\n" not in warning
    harm(tmp_path / "step-00000010")
    with pytest.raises(
        UserError, match=r"no whole checkpoint.*step-00000020.*step-00000010"
    ) as error:
        load_checkpoint(tmp_path)
    assert "start a new run" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_checkpoint_at_all_is_refused_with_the_remedy(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no checkpoint in .* start a new run"):
            load_checkpoint(folder)


def test_saving_after_a_fallback_keeps_the_new_ones_not_the_damaged(tmp_path):
    """A damaged future one must not push whole ones out, nor be taken for the newest later."""
    model, optimizer = save_steps(tmp_path, 10, 20, 30)
    for step in (20, 30):
        truncate(tmp_path / f"step-000000{step}")
    for step in (15, 20):
        assert load_checkpoint(tmp_path)[0].step < step
        assert save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2).is_dir()
        found, warnings = load_checkpoint(tmp_path)
        assert (found.step, warnings) == (step, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


class Stop(BaseException):
    """Like KeyboardInterrupt, and kill -9 as far as the disk can tell."""


@pytest.mark.parametrize("failure", [Stop(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("call", ["mkdir", "model", "optimizer", "meta", "rename"])
def test_an_interrupted_write_leaves_the_others_whole_and_can_be_repeated(
    tmp_path, monkeypatch, failure, call
):
    model, optimizer = save_steps(tmp_path, 10)
    with monkeypatch.context() as patch:
        write = module.write_synced

        def fail(*_, **__):
            raise failure

        def half(path, data):
            if not path.name.startswith(call):
                return write(path, data)
            path.write_bytes(data[: len(data) // 2])
            raise failure

        if call in ("mkdir", "rename"):
            patch.setattr(Path, call, fail)
        else:
            patch.setattr(module, "write_synced", half)
        with pytest.raises(type(failure)):
            save_checkpoint(tmp_path, 20, model, optimizer, {}, keep=2)
    found, warnings = load_checkpoint(tmp_path)
    assert (found.step, warnings) == (10, [])
    save_checkpoint(tmp_path, 20, model, optimizer, {}, keep=2)
    assert load_checkpoint(tmp_path)[0].step == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_another_network_is_refused_by_the_name_of_a_weight(tmp_path):
    save_steps(tmp_path, 1)
    tensors = load_checkpoint(tmp_path)[0].model()
    other = Toy()
    other.extra = nn.Linear(1, 1)
    for model, words in (
        (Toy(width=4), r"layer\.bias has shape \(3,\), the model needs \(4,\): another network"),
        (other, r"extra\.bias is missing in the checkpoint: another network"),
        (nn.Linear(2, 3), "missing in the"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match=words) as error:
            load_model(model, tensors, tmp_path)
        assert str(error.value).startswith(f"{tmp_path}: weight ")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_trained_while_a_snapshot_is_written_is_not_in_it(tmp_path):
    model, optimizer = trained()
    before = {k: v.clone() for k, v in model_tensors(model).items()}
    momentum = optimizer.state[model.layer.weight]["momentum_buffer"].clone()
    snapshot = take_snapshot(3, model, optimizer, {})
    with torch.no_grad():
        model.layer.weight.fill_(9)
        optimizer.state[model.layer.weight]["momentum_buffer"].fill_(9)
    write_checkpoint(tmp_path, snapshot, keep=2, best=None)
    found = load_checkpoint(tmp_path)[0]
    assert all(torch.equal(found.model()[k], v) for k, v in before.items())
    assert torch.equal(found.optimizer()["layer.weight/momentum_buffer"], momentum)


def test_the_same_state_makes_the_same_bytes(tmp_path):
    model, optimizer = trained()
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, 3, model, optimizer, {"x": 1.5}, keep=2, ema=model)
    for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "meta.json"):
        one, other = (tmp_path / name / "step-00000003" / file for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


def test_averaged_weights_are_a_file_of_their_own(tmp_path):
    model, optimizer = trained()
    average = Toy()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=2, ema=average)
    found = load_checkpoint(tmp_path)[0]
    assert torch.equal(found.ema()["layer.weight"], average.layer.weight)
    assert torch.equal(found.model()["layer.weight"], model.layer.weight)
    save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=2)
    assert load_checkpoint(tmp_path)[0].ema() is None


def test_the_best_is_kept_beside_the_newest(tmp_path):
    model, optimizer = trained()
    kept = []
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2, best=best)
        kept.append([int(p.name[-8:]) for p in sorted(tmp_path.iterdir())])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]
    assert load_checkpoint(tmp_path, 6)[0].step == 6
    with pytest.raises(UserError, match="no checkpoint of step 2 in"):
        load_checkpoint(tmp_path, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value, where):
    save_steps(tmp_path, 10)
    (model, optimizer), average = trained(), Toy()
    with torch.no_grad():
        {"model": model, "ema": average}[where].layer.bias[1] = value
    words = r"^step 20: weight layer\.bias is not finite, so no checkpoint is written"
    with pytest.raises(DivergedError, match=words):
        save_checkpoint(tmp_path, 20, model, optimizer, {}, keep=2, ema=average)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_nor_read_though_their_checksum_is_right(tmp_path):
    model, optimizer = save_steps(tmp_path, 10)
    snapshot = take_snapshot(20, model, optimizer, {})
    snapshot.tensors["model.safetensors"]["layer.bias"][0] = float("nan")
    write_checkpoint(tmp_path, snapshot, keep=2, best=None)
    found, [warning] = load_checkpoint(tmp_path)
    assert found.step == 10
    assert "weight layer.bias in model.safetensors is not finite; using the" in warning


def test_an_older_format_says_so(tmp_path):
    save_steps(tmp_path, 10)
    meta = tmp_path / "step-00000010" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match="format 1 is of an older version of sparsemae"):
        load_checkpoint(tmp_path)


def test_a_file_that_is_not_safetensors_is_named_though_its_checksum_is_right(tmp_path):
    save_steps(tmp_path, 10)
    folder = tmp_path / "step-00000010"
    data = b"\x80\x04cos\nsystem\n."  # a pickle that would call something
    (folder / "model.safetensors").write_bytes(data)
    meta = json.loads((folder / "meta.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    meta["files"]["model.safetensors"] = {"size": len(data), "sha256": digest}
    (folder / "meta.json").write_text(json.dumps(sealed(meta)))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(tmp_path)


def test_leftovers_of_a_killed_process_are_cleaned_up_and_nothing_else(tmp_path):
    save_steps(tmp_path, 10)
    for name in (".tmp-step-00000020", ".del-step-00000005"):
        shutil.copytree(tmp_path / "step-00000010", tmp_path / name)
    (tmp_path / "mine.txt").write_text("mine")
    module.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "step-00000010"]


def test_an_optimizer_of_another_network_is_refused(tmp_path):
    save_steps(tmp_path, 1)
    tensors = load_checkpoint(tmp_path)[0].optimizer()
    for model in (Toy(width=4), nn.Linear(2, 3)):
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(UserError, match=r"optimiser state layer\..* does not fit: another"):
            load_optimizer(model, optimizer, tensors, tmp_path)
