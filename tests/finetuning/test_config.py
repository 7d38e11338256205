"""The configuration of fine-tuning: what follows from what, and what contradicts itself."""

import itertools

import pytest

from sparsemae.config import apply_overrides, build_config, load_config, recipes
from sparsemae.errors import UserError
from sparsemae.finetuning import config as module
from sparsemae.finetuning.config import FinetuneConfig
from sparsemae.training.schedules import learning_rate


def build(*overrides):
    raw = {"train": {"steps": 200}}
    apply_overrides(raw, overrides)
    return build_config(FinetuneConfig, raw)


@pytest.mark.parametrize(
    ("overrides", "schedule", "curve", "warmup", "lr"),
    [
        ((), "default", "poly", 0, 1e-2),
        (("init=x.pth",), "sawtooth", "sawtooth", 20, 1e-3),
        (("init=x.pth", "schedule=warmup"), "warmup", "poly", 20, 1e-3),
        (("init=x.pth", "schedule=frozen", "warmup=0.25"), "frozen", "poly", 50, 1e-3),
        (("init=x.pth", "schedule=default"), "default", "poly", 0, 1e-2),
        (("schedule=warmup", "train.lr=0.5"), "warmup", "poly", 20, 0.5),
        (("init=x.pth", "train.warmup=7", "train.lr=1e-4"), "sawtooth", "sawtooth", 7, 1e-4),
    ],
)
def test_schedules_are_spelled_out(overrides, schedule, curve, warmup, lr):
    config = build(*overrides).resolved()
    assert config.schedule == schedule
    train = config.train
    assert (train.schedule, train.warmup, train.lr) == (curve, warmup, lr)
    again = build_config(FinetuneConfig, config.model_dump(mode="json", exclude_none=True))
    assert again.resolved().model_dump() == config.model_dump()


def test_sawtooth_holds_the_encoder_back_then_warms_all_up_then_falls():
    train = build("init=x.pth").resolved().train
    encoder, decoder = (
        [learning_rate(step, train, group) for step in range(200)]
        for group in ("encoder", "decoder")
    )
    assert encoder[:20] == [0.0] * 20
    assert decoder[19] == encoder[39] == decoder[39] == pytest.approx(1e-3)
    assert decoder[20] == encoder[20] == pytest.approx(1e-3 / 20)
    assert all(a > b for a, b in itertools.pairwise(decoder[40:]))
    assert decoder[40:] == encoder[40:]


@pytest.mark.parametrize("schedule", ["sawtooth", "frozen"])
def test_what_protects_weights_needs_some(schedule):
    with pytest.raises(UserError, match="give --init"):
        build(f"schedule={schedule}").resolved()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("schedule=sawtooth", "init=x", "train.schedule=cosine"), "train.schedule cosine"),
        (("fold=some",), "fold"),
        (("fold=-1",), "fold"),
        (("transfer=decoder",), "transfer"),
        (("data.foreground=1.5",), "data.foreground"),
        (("data.patch=32",), "did you mean data.patch_size"),
        (("plan.preset=S",), "plan.preset"),
        (("warmup=0.5",), "warmup"),
        (("init=x", "train.warmup=100"), "train.warmup 100, twice with sawtooth"),
        (("plan.spacing=[1,1]",), "plan.spacing"),
    ],
)
def test_contradictions_name_the_key(overrides, words):
    with pytest.raises(UserError) as caught:
        build(*overrides).resolved()
    assert words in str(caught.value)


def test_augmentation_is_decided_once(monkeypatch):
    monkeypatch.setattr(module, "has_library", lambda: True)
    assert build().resolved().data.augmentation == "batchgenerators"
    monkeypatch.setattr(module, "has_library", lambda: False)
    assert build().resolved().data.augmentation == "plain"
    with pytest.raises(UserError, match=r"sparsemae\[augmentation\]"):
        build("data.augmentation=batchgenerators").resolved()


def test_a_resumed_run_may_be_longer_but_not_other():
    first = build("init=x.pth").resolved()
    longer = first.model_copy(update={"train": first.train.model_copy(update={"steps": 900})})
    assert longer.defining() == first.defining()
    other = first.model_copy(update={"seed": 1})
    assert other.defining() != first.defining()


def test_recipes_are_valid():
    assert recipes(FinetuneConfig.recipes) == ["finetune", "scratch"]
    assert load_config(FinetuneConfig, "scratch").resolved().schedule == "default"
    fine = load_config(FinetuneConfig, "finetune", ["init=x.pth"]).resolved()
    assert (fine.schedule, fine.train.warmup, fine.train.lr) == ("sawtooth", 3750, 1e-3)
