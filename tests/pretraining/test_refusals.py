"""What does not fit together is refused before anything is written, with the key and the remedy."""

import re

import pytest

from sparsemae.config import load_config
from sparsemae.errors import UserError
from sparsemae.pretrain import PretrainConfig, build_mae, pretrain

SMALL = ("data.patch_size=16", "data.workers=0", "train.steps=6", "train.save_every=2")


def config(*overrides):
    return load_config(PretrainConfig, "tiny", [*SMALL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.patch_size=20"],
            "data.patch_size (20, 20, 20) does not divide by the network's total",
        ),
        (["data.patch_size=8"], "data.patch_size (8, 8, 8) leaves one voxel at the bottleneck"),
        (["mask.block_size=16"], "data.patch_size (16, 16, 16) is a single mask cell"),
        (["mask.block_size=12"], "mask.block_size (12, 12, 12) does not fit stage 3"),
        (["mask.ratio=0.01"], "mask.ratio 0.01 leaves no visible or no masked cell"),
        (["mask.block_size=2", "decode=masked"], "decode 'masked' restricts 2 levels"),
        (["train.device=tpu"], "train.device tpu: not on this machine"),
        (
            ["train.precision=bf16", "train.device=cpu"],
            "train.precision bf16: on a CPU the library",
        ),
        (["train.cuda_graphs=true"], "train.cuda_graphs: not offered"),
        (["train.warmup=6"], "train.warmup 6 leaves nothing of train.steps 6"),
        (["train.schedule=sawtooth"], "train.schedule sawtooth: it protects a pre-trained encoder"),
        (["train.accumulate=3"], "train.accumulate 3: a step has 2 samples of data.batch_size 2"),
        (["mask.ratio=[0.01,0.5]"], "mask.ratio 0.01 leaves no visible or no masked cell"),
        (["mask.ratio=[0.5,0.875]"], "mask.ratio 0.875 leaves one visible voxel at the bottleneck"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, store, overrides, words):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        pretrain(store, run, config(*overrides))
    assert not run.exists()


def test_a_bottleneck_of_one_visible_voxel_is_refused():
    assert build_mae(config("mask.ratio=0.75"))  # two of eight cells
    with pytest.raises(UserError, match=r"mask\.ratio 0\.875 leaves one visible voxel at the bott"):
        build_mae(config("mask.ratio=0.875"))
    assert build_mae(config("mask.ratio=0.875", "sparse=false"))
