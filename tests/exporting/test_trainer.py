"""nnU-Net's fine-tuning trainer that goes with an export; here without nnU-Net."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from sparsemae.export import export
from sparsemae.models.resenc import ResEncUNet
from sparsemae.training.options import TrainConfig
from sparsemae.training.schedules import learning_rate


class Base:
    """What of `nnUNetTrainer` the trainer builds on."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        self.initial_lr, self.num_epochs, self.weight_decay = 1e-2, 1000, 3e-5


@pytest.fixture
def module(monkeypatch, tmp_path):
    """The file as it is shipped."""
    network = ResEncUNet(1, 2, (4, 6), (1, 2), (1, 1))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    export(tmp_path / "x.pth", "nnunet", tmp_path / "out" / "y.pth", trainer=True)
    parts = ["nnunetv2", "training", "nnUNetTrainer", "nnUNetTrainer"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    sys.modules[".".join(parts)].nnUNetTrainer = Base
    path = tmp_path / "out" / "nnunet_trainer" / "nnUNetTrainerSawtooth.py"
    spec = importlib.util.spec_from_file_location("nnUNetTrainerSawtooth", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trainer(module, network):
    out = module.nnUNetTrainerSawtooth({}, "3d_fullres", 0, {}, torch.device("cpu"))
    out.network = network
    return out


def test_its_schedule_is_our_sawtooth(module):
    config = TrainConfig(steps=150, lr=1e-3, schedule="sawtooth", warmup=15)
    for epoch in range(150):
        decoder, encoder = module.sawtooth(epoch, 150, 15, 1e-3)
        assert decoder == pytest.approx(learning_rate(epoch, config, "decoder"))
        assert encoder == pytest.approx(learning_rate(epoch, config, "encoder"))
    assert module.sawtooth(0, 1, 0, 1e-3) == (1e-3, 1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_decoder_warms_up_alone(module, compiled):
    network = ResEncUNet(1, 2, (4, 6), (1, 2), (1, 1))
    wrapped = network
    if compiled:
        wrapped = nn.Module()
        wrapped._orig_mod = network
    made = trainer(module, wrapped)
    assert (made.num_epochs, made.initial_lr) == (150, 1e-3)
    optimizer, schedule = made.configure_optimizers()
    decoder, encoder = optimizer.param_groups
    assert len(decoder["params"]) + len(encoder["params"]) == len(list(network.parameters()))
    assert {id(p) for p in encoder["params"]} == {id(p) for p in network.encoder.parameters()}
    before = [p.detach().clone() for p in network.encoder.parameters()]
    schedule.step(0)
    assert (decoder["lr"], encoder["lr"]) == (pytest.approx(1e-3 / 15), 0)
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.encoder.parameters(), strict=True))
    assert any(p in optimizer.state for p in encoder["params"])
    schedule.step(15)
    assert not any(p in optimizer.state for p in encoder["params"])
    assert any(p in optimizer.state for p in decoder["params"])
    assert decoder["lr"] == encoder["lr"] == pytest.approx(1e-3 / 15)


def test_the_same_trainer_may_lie_there_already(module, tmp_path):
    export(tmp_path / "x.pth", "nnunet", tmp_path / "out" / "z.pth", trainer=True)
    path = tmp_path / "out" / "nnunet_trainer" / "nnUNetTrainerSawtooth.py"
    path.write_text("# mine")
    with pytest.raises(ValueError, match=r"nnUNetTrainerSawtooth.py exists already"):
        export(tmp_path / "x.pth", "nnunet", tmp_path / "out" / "w.pth", trainer=True)
    assert path.read_text() == "# mine"
