"""Checkpoints: bit-equal round trips, and an older one survives whatever happens to the newest."""

import errno
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
    save_checkpoint,
)
from sparsemae.errors import UserError
from sparsemae.models.resenc import ResEncUNet
from sparsemae.training import TrainConfig, make_optimizer

PLAN = {"features_per_stage": (2, 3), "strides": (1, 2), "n_blocks_per_stage": (1, 1)}


class Toy(nn.Module):
    """A layer under two names, a frozen one, and a buffer."""

    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(2, width)
        self.alias = self.layer
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("seen", torch.tensor(7))


def trained(optimizer="sgd", steps=3, model=None, **options):
    """A model and its optimiser after a few steps."""
    model = model or Toy()
    config = TrainConfig(steps=steps, optimizer=optimizer, **options)
    optimizer = make_optimizer(model, config)
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
    load_optimizer(twin, twin_optimizer, found.optimizer())
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
    optimizer = make_optimizer(network, TrainConfig(steps=1))
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
    "meta is half": (lambda p: (p / "meta.json").write_text('{"format": 1, "st'), "meta.json"),
    "meta is a list": (lambda p: (p / "meta.json").write_text("[1]"), "meta.json is damaged"),
    "meta lists files oddly": (
        lambda p: (p / "meta.json").write_text('{"format": 1, "files": []}'),
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
        lambda p: (p / "meta.json").write_text('{"format": 1, "step": 20, "files": {}}'),
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
        with pytest.raises(UserError, match=r"no checkpoint in .* remove its folder and start it"):
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
