"""A data set becomes a run that learns, goes on after anything, and refuses what cannot be."""

import json
import shutil
from io import StringIO

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from sparsemae.checkpoint import load_checkpoint
from sparsemae.config import apply_overrides, build_config
from sparsemae.errors import UserError
from sparsemae.finetune import FinetuneConfig, finetune, load_finetuned, start_network
from sparsemae.finetuning.runs import read_plan
from sparsemae.pretrain import load_run, pretrain
from sparsemae.transfer.pretrained import read_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(small_plans):
    """`config("key=value", ...)`: of a run of a few steps with a very small network."""

    def make(*overrides):
        raw = {
            "plan": {"file": str(small_plans)},
            "data": {"augmentation": "plain", "validation": 2},
            "train": {"steps": 6, "save_every": 2},
        }
        apply_overrides(raw, overrides)
        return build_config(FinetuneConfig, raw)

    return make


def files_of(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_it_learns_to_segment(finetuned):
    losses = [
        record["loss"]
        for record in map(json.loads, (finetuned / "metrics.jsonl").read_text().splitlines())
        if "loss" in record
    ]
    assert len(losses) == 80
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    loaded = load_finetuned(finetuned)
    assert loaded.task.classes.names == ("background", "shell", "core")
    assert loaded.task.dataset == "Dataset009_Eggs"
    assert len(loaded.task.train) == 3
    assert set(loaded.task.val).isdisjoint(loaded.task.train)
    assert loaded.plan == read_plan(finetuned)
    out = loaded.network(torch.zeros(1, 1, 16, 16, 16))
    assert out.shape == (1, 3, 16, 16, 16)
    assert loaded.checkpoint.meta["trainer"]["best"][1] < 0.3  # 1 minus Dice


def test_stopped_and_resumed_it_ends_with_the_same_bytes(labelled, tmp_path, config):
    shared = {"store": tmp_path / "stores"}
    whole = finetune(labelled, tmp_path / "whole", config(), **shared)
    asked = []

    def stop():
        asked.append(1)
        return 85 if len(asked) > 3 else 0

    part = finetune(labelled, tmp_path / "part", config(), stop=stop, **shared)
    assert part.exit_code == 85
    assert 0 < part.step < 6
    again = finetune(labelled, tmp_path / "part", None, resume=True, **shared)
    assert again.step == 6
    assert files_of(again.checkpoint) == files_of(whole.checkpoint)
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "part")]
    assert metrics[0] == metrics[1]


def test_a_resumed_run_keeps_its_plan_and_data(labelled, tmp_path, config, draw_labelled):
    run = tmp_path / "run"
    finetune(labelled, run, config())
    longer = finetune(labelled, run, None, overrides=["train.steps=8"], resume=True)
    assert longer.step == 8
    with pytest.raises(UserError, match="keeps its seed"):
        finetune(labelled, run, None, overrides=["seed=3"], resume=True)
    other = draw_labelled(tmp_path / "Dataset010_Others")
    with pytest.raises(UserError, match="not the data this run was started on"):
        finetune(other, run, None, resume=True)
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"batch_dice": True}))
    with pytest.raises(UserError, match=r"plan\.batch_dice"):
        finetune(labelled, run, None, resume=True)
    (run / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: not valid JSON"):
        finetune(labelled, run, None, resume=True)


def test_a_resumed_run_keeps_its_cases_start_and_plan(tmp_path, config, draw_labelled, small_plans):
    """More cases, a splits file that is gone, another start or plan: the run is what it was."""
    folder, run = draw_labelled(tmp_path / "Dataset001_Grows", 4), tmp_path / "run"
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps([{"train": ["case_0", "case_3"], "val": ["case_1"]}]))
    stores = tmp_path / "stores"
    asked = config(f"splits={json.dumps(str(splits))}")
    finetune(folder, run, asked, store=stores)
    splits.unlink()
    for part, name in (("imagesTr", "case_{}_0000.nii.gz"), ("labelsTr", "case_{}.nii.gz")):
        shutil.copy(folder / part / name.format(1), folder / part / name.format(9))
    finetune(folder, run, None, overrides=["train.steps=8"], resume=True)
    task = load_finetuned(run).task
    assert (task.train, task.val) == (("case_0", "case_3"), ("case_1",))
    assert not (run / "store").exists()  # it still knows where its cases lie
    # given again, as by a scheduler, the configuration may be longer, too
    again = config(f"splits={json.dumps(str(splits))}", "train.steps=10")
    assert finetune(folder, run, again, resume=True).step == 10
    with pytest.raises(UserError, match="started from none"):
        finetune(folder, run, config("init=other"), resume=True)
    other = config("train.steps=10").model_copy(
        update={"plan": config().plan.model_copy(update={"file": "other.json"})}
    )
    with pytest.raises(UserError, match="keeps its plan"):
        finetune(folder, run, other, resume=True)
    with pytest.raises(UserError, match=r"did you mean train\.steps"):
        finetune(folder, run, None, overrides=["train.step=9"], resume=True)
    (folder / "labelsTr" / "case_3.nii.gz").unlink()
    (folder / "imagesTr" / "case_3_0000.nii.gz").unlink()
    with pytest.raises(UserError, match="case case_3 of the run"):
        finetune(folder, run, None, resume=True)
    two = draw_labelled(tmp_path / "Dataset002_Two", 4, channels=2)
    with pytest.raises(UserError, match="other channels than the run"):
        finetune(two, run, None, resume=True)
    assert not (run / "store").exists()


def test_it_can_be_prepared_beforehand(labelled, tmp_path, config):
    run = tmp_path / "run"
    outcome = finetune(labelled, run, config(), prepare_only=True)
    assert (outcome.step, outcome.exit_code) == (0, 0)
    before = {p: p.stat().st_mtime_ns for p in outcome.checkpoint.rglob("*.b2nd")}
    assert len(before) == 12
    assert finetune(labelled, run, config()).step == 6
    assert {p: p.stat().st_mtime_ns for p in outcome.checkpoint.rglob("*.b2nd")} == before


def test_a_batch_that_cannot_be_split_is_refused_before_the_work(labelled, tmp_path, config):
    with pytest.raises(UserError, match=r"train\.accumulate 3"):
        finetune(labelled, tmp_path / "run", config("train.accumulate=3"))
    assert not (tmp_path / "run" / "store").exists()


def test_runs_share_prepared_cases(labelled, tmp_path, config):
    store = tmp_path / "stores"
    finetune(labelled, tmp_path / "one", config("train.steps=2"), store=store)
    (folder,) = store.iterdir()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.b2nd")}
    finetune(labelled, tmp_path / "two", config("train.steps=2", "fold=1"), store=store)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.b2nd")} == before
    assert not (tmp_path / "two" / "store").exists()
    tasks = [load_finetuned(tmp_path / run).task for run in ("one", "two")]
    assert set(tasks[0].val).isdisjoint(tasks[1].val)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, store):
    """A pre-training run of two steps."""
    from sparsemae.pretrain import PretrainConfig, pretrain

    run = tmp_path_factory.mktemp("pretrained") / "run"
    raw = {
        "model": {"preset": "tiny"},
        "mask": {"block_size": 8},
        "data": {"patch_size": 16, "batch_size": 1, "validation": 0},
        "train": {"steps": 2, "save_every": 2},
    }
    pretrain(store, run, build_config(PretrainConfig, raw))
    return run


def like_pretrained(config, run, *overrides):
    raw = config().model_dump(mode="json", exclude_unset=True)
    del raw["plan"]
    apply_overrides(raw, [f"init={json.dumps(str(run))}", "data.patch_size=16", *overrides])
    return build_config(FinetuneConfig, raw)


def test_a_pretrained_start_has_the_pretrained_weights(labelled, tmp_path, config, pretrained):
    text = StringIO()
    shown = Console(file=text, width=120)
    asked = like_pretrained(config, pretrained, "train.keep=9", "train.save_every=1")
    finetune(labelled, tmp_path / "run", asked, console=shown)
    before = load_run(pretrained).mae.network
    plan = read_plan(tmp_path / "run")
    assert plan.planner == "like_pretrained"
    assert plan.topology == before.topology
    first, _ = load_checkpoint(tmp_path / "run" / "checkpoints", 1)
    weights, own = first.model(), dict(before.named_parameters())
    # in the first step the decoder alone is trained
    for name, tensor in weights.items():
        if name.startswith("encoder"):
            assert torch.equal(tensor, own[name]), name
        elif "seg_layers" not in name:
            assert not torch.equal(tensor, own[name]), name
            torch.testing.assert_close(tensor, own[name], atol=0.05, rtol=0.2)
    for word in ("encoder stage 3", "copied", "fresh", "100% of the encoder", "mask tokens"):
        assert word in text.getvalue()


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (("transfer=encoder",), lambda name: name.startswith("encoder")),
        ((), lambda name: "seg_layers" not in name),
    ],
)
def test_what_is_transferred_is_what_was_asked(config, pretrained, make_plan, overrides, same):
    asked = like_pretrained(config, pretrained, *overrides).resolved()
    read = read_pretrained(pretrained)
    plan = make_plan(read.topology)
    network, _ = start_network(asked, plan, 3, read)
    fresh, _ = start_network(asked, plan, 3, None)
    for name, parameter in network.named_parameters():
        expected = read.tensors[name] if same(name) else dict(fresh.named_parameters())[name]
        assert torch.equal(parameter, expected), name


@pytest.fixture
def make_plan():
    from sparsemae.planning.plan import ChannelPlan, Plan

    def make(topology):
        return Plan(
            planner="like_pretrained",
            spacing=(1.0, 1.0, 1.0),
            patch_size=(16, 16, 16),
            batch_size=2,
            channels=(ChannelPlan(name="MR0"),),
            features_per_stage=topology.features,
            strides=topology.strides,
            n_blocks_per_stage=topology.blocks,
            kernel_sizes=topology.kernels,
            n_conv_per_stage_decoder=topology.decoder_convs,
        )

    return make


def test_a_frozen_encoder_stays(labelled, tmp_path, config, pretrained):
    asked = like_pretrained(config, pretrained, "schedule=frozen", "train.lr=0.1")
    outcome = finetune(labelled, tmp_path / "run", asked)
    weights = load_checkpoint(outcome.checkpoint.parent)[0].model()
    own = dict(load_run(pretrained).mae.network.named_parameters())
    changed = {name for name in weights if not torch.equal(weights[name], own[name])}
    assert changed
    assert not any(name.startswith("encoder") for name in changed)


def test_a_finetuned_run_is_a_start_too(labelled, tmp_path, config, finetuned):
    asked = config(f"init={json.dumps(str(finetuned))}", "train.steps=3")
    finetune(labelled, tmp_path / "run", asked)
    assert load_finetuned(tmp_path / "run").config.init == str(finetuned)


def test_useless_weights_are_refused_before_anything_is_prepared(
    labelled, tmp_path, config, pretrained
):
    asked = config(f"init={json.dumps(str(pretrained))}")  # another network
    with pytest.raises(UserError, match="of the encoder's weights fit"):
        finetune(labelled, tmp_path / "run", asked)
    assert not (tmp_path / "run" / "store").exists()
    assert not (tmp_path / "run" / "config.toml").exists()
    finetune(labelled, tmp_path / "run", config("train.steps=2"))  # the folder is still free


def test_runs_of_one_kind_are_not_taken_for_the_other(finetuned, pretrained, labelled, store):
    with pytest.raises(UserError, match=r"run of pre-training.*sparsemae finetune"):
        load_finetuned(pretrained)
    with pytest.raises(UserError, match="fine-tuning run"):
        load_run(finetuned)
    with pytest.raises(UserError, match="holds a run of `sparsemae pretrain`"):
        finetune(labelled, pretrained, None, resume=True)
    with pytest.raises(UserError, match="holds a run of `sparsemae finetune`"):
        pretrain(store, finetuned, None, resume=True)


def spoil_label(folder, change):
    path = folder / "labelsTr" / "case_1.nii.gz"
    image = nibabel.load(path)
    array, affine = change(np.asarray(image.dataobj).astype(np.float32), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def shifted(array, affine):
    affine[0, 3] += 5
    return array, affine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, m: (a[:-1], m), "shape"),
        (shifted, "lies up to 5 mm off"),
        (lambda a, m: (a * 0.5, m), "a label of 0.5"),
        (lambda a, m: (a * 4, m), "class 4, 8 is not among 0, 1, 2"),
    ],
)
@pytest.mark.parametrize("planned", ["plans.json", "nnunet"])
def test_unfit_labels_end_it_before_training(
    tmp_path, draw_labelled, config, change, words, planned
):
    folder = draw_labelled(tmp_path / "Dataset001_Bad", 3)
    spoil_label(folder, change)
    asked = config()
    if planned == "nnunet":
        raw = asked.model_dump(mode="json", exclude_unset=True) | {"plan": {"mode": "nnunet"}}
        asked = build_config(FinetuneConfig, raw)
    with pytest.raises(UserError) as caught:
        finetune(folder, tmp_path / "run", asked)
    assert words in str(caught.value)
    assert "case_1.nii.gz" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_wrong_number_of_channels_ends_it(tmp_path, draw_labelled, config):
    folder = draw_labelled(tmp_path / "Dataset001_Two", 3, channels=2)
    with pytest.raises(UserError, match="channel"):
        finetune(folder, tmp_path / "run", config())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"file": "plans.json", "mode": "nnunet"}, r"plan\.mode: plan\.file decides"),
        ({"mode": "nnunet", "like": "FINETUNED"}, r"plan\.like: a plan of mode nnunet"),
        ({"mode": "auto", "like": "FINETUNED", "preset": "M"}, r"plan\.preset: .*like_pretrained"),
    ],
)
def test_keys_of_a_plan_that_would_do_nothing_are_refused(
    labelled, tmp_path, config, finetuned, small_plans, keys, words
):
    places = {"plans.json": str(small_plans), "FINETUNED": str(finetuned)}
    plan = {key: places.get(value, value) for key, value in keys.items()}
    raw = config().model_dump(mode="json", exclude_unset=True) | {"plan": plan}
    with pytest.raises(UserError, match=words):
        finetune(labelled, tmp_path / "run", build_config(FinetuneConfig, raw))


def test_the_store_may_not_vanish_from_a_run(labelled, tmp_path, config):
    run = tmp_path / "run"
    finetune(labelled, run, config())
    shutil.rmtree(run / "store")
    assert finetune(labelled, run, None, overrides=["train.steps=8"], resume=True).step == 8
