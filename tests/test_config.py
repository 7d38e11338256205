"""Configuration: recipes, order of sources, and strictness with messages that name the key."""

import re

import pytest

from sparsemae.config import Strict, build_config, dump_config, load_config, recipes
from sparsemae.errors import UserError
from sparsemae.models.resenc import ResEncUNet
from sparsemae.pretrain import PretrainConfig, build_mae


def load(*overrides, source="tiny"):
    return load_config(PretrainConfig, source, overrides)


def refusal(*overrides, source="tiny"):
    with pytest.raises(UserError) as error:
        load(*overrides, source=source)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_recipes_are_shipped_and_valid():
    assert recipes() == ["s3d-resenc-l", "tiny"]
    for name in recipes():
        assert load(source=name).sparse
    build_mae(load())  # patch, cell and network fit together


def test_the_published_recipe_has_the_published_values():
    """arXiv 2410.23132; shared/docs/recipe.md. Build the network, not only its name."""
    config = load(source="s3d-resenc-l")
    assert config.model_dump() == {
        "seed": 0,
        "backend": "auto",
        "decode": "all",
        "densify": True,
        "sparse": True,
        "model": {"preset": "L"},
        "mask": {"ratio": 0.75, "block_size": (32, 32, 32)},
        "data": {
            "patch_size": (160, 160, 160),
            "batch_size": 6,
            "workers": 12,
            "foreground": 0.0,
            "timeout": 300.0,
            "mirror": True,
            "rotation": 30.0,
            "rotation_probability": 0.2,
            "scale": (0.7, 1.4),
            "scale_probability": 0.2,
            "validation": 16,
        },
        "train": {
            "steps": 250_000,
            "optimizer": "sgd",
            "lr": 1e-2,
            "schedule": "poly",
            "warmup": 0,
            "momentum": 0.99,
            "weight_decay": 3e-5,
            "clip_norm": 12.0,
            "accumulate": 1,
            "ema": None,
            "precision": "bf16",
            "compile": False,
            "cuda_graphs": False,
            "deterministic": False,
            "max_skipped": 3,
            "save_every": 1000,
            "keep": 2,
            "tensorboard": False,
            "device": "auto",
        },
    }
    network = ResEncUNet.from_preset(config.model.preset)
    topology = network.topology
    assert topology.features == (32, 64, 128, 256, 320, 320)
    assert topology.blocks == (1, 3, 4, 6, 6, 6)
    assert topology.decoder_convs == (1,) * 5
    assert network.total_stride == (32, 32, 32) == config.mask.block_size  # bottleneck-aligned
    million = 1e6
    assert sum(p.numel() for p in network.parameters()) / million == pytest.approx(102.35, abs=0.05)
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert encoder / million == pytest.approx(90.3, abs=0.05)


def test_overrides_come_after_the_file_and_the_last_one_wins(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'decode = 0.5\n[model]\npreset = "tiny"\n[data]\npatch_size = [32, 48, 64]\n'
        "batch_size = 3\n[train]\nsteps = 7\n"
    )
    for source in (file, str(file)):
        config = load("train.steps=8", "train.lr=1", "train.steps=9", source=source)
        assert config.train.steps == 9
        assert config.data.patch_size == (32, 48, 64)
        assert config.decode == 0.5
        assert config.train.lr == 1.0  # a whole number will do for a real one
        assert isinstance(config.train.lr, float)
    config = load(" decode = masked ", "data.patch_size=96", "mask.block_size=[8,16,8]")
    assert (config.decode, config.data.patch_size) == ("masked", (96,) * 3)
    assert config.mask.block_size == (8, 16, 8)
    assert load("decode='all'").decode == "all"


def test_a_configuration_cannot_be_changed():
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


@pytest.mark.parametrize(
    "overrides",
    [[], ["decode=0.25", "mask.block_size=[4,8,8]"], ["decode=masked", "mask.ratio=[0.6,0.9]"]],
)
def test_dump_and_load_round_trip(tmp_path, overrides):
    config = load(*overrides)
    dump_config(config, tmp_path / "config.toml")
    assert load(source=tmp_path / "config.toml") == config


WRONG = {  # override: what its message says after the key
    "train.steps=true": "should be a valid integer, got True",
    "train.steps=10.0": "should be a valid integer, got 10.0",
    "train.steps=ten": "should be a valid integer, got 'ten'",
    "train.steps=0": "should be greater than 0, got 0",
    "train.steps=-5": "should be greater than 0, got -5",
    "train.lr='0.1'": "should be a valid number, got '0.1'",
    "train.lr=true": "should be a valid number, got True",
    "train.lr=inf": "should be a finite number, got inf",
    "train.lr=nan": "should be a finite number, got nan",
    "train.momentum=1": "should be less than 1, got 1",
    "train.keep=1": "should be greater than or equal to 2, got 1",
    "train.optimizer=adam": "should be 'sgd' or 'adamw', got 'adam'",
    "train.device=0": "should be a valid string, got 0",
    "data.mirror=1": "should be a valid boolean, got 1",
    "data.mirror=yes": "should be a valid boolean, got 'yes'",
    "data.rotation=200": "should be less than or equal to 180, got 200",
    "data.rotation_probability=-0.1": "should be greater than or equal to 0, got -0.1",
    "data.scale=[1.4,0.7]": "give two numbers above 0, the smaller first, got [1.4, 0.7]",
    "data.foreground=2": "should be less than or equal to 1, got 2",
    "data.timeout=0": "should be greater than 0, got 0",
    "data.batch_size=0": "should be greater than 0, got 0",
    "data.patch_size=true": "give one whole number of voxels, or a list of three, got True",
    "data.patch_size=64,64,64": "or a list of three, got '64,64,64'",
    "data.patch_size=[64, 64]": "or a list of three, got [64, 64]",
    "data.patch_size=[64, 64, 0]": "should be greater than 0, got 0",
    "data.patch_size=64.0": "or a list of three, got 64.0",
    "mask.block_size=0": "should be greater than 0, got 0",
    "mask.ratio=0": "should be greater than 0, got 0",
    "mask.ratio=1": "should be less than 1, got 1",
    "mask.ratio='0.5'": "between 0 and 1, or a list of two, the smaller first, got '0.5'",
    "mask.ratio=[0.9,0.6]": "or a list of two, the smaller first, got [0.9, 0.6]",
    "mask.ratio=[0.6,1]": "or a list of two, the smaller first, got [0.6, 1]",
    "mask.ratio=true": "or a list of two, the smaller first, got True",
    "train.ema=1": "should be less than 1, got 1",
    "train.accumulate=0": "should be greater than 0, got 0",
    "train.precision=half": "should be 'fp32', 'bf16' or 'fp16', got 'half'",
    "train.schedule=step": "should be 'poly', 'cosine', 'constant' or 'sawtooth', got 'step'",
    "decode=most": "should be 'all' or 'masked' or should be a valid number, got 'most'",
    "decode=1": "should be 'all' or 'masked' or should be less than 1, got 1",
    "decode=true": "got True",
    "model.preset=l": "unknown preset, choose from tiny, S, M, L, XL, got 'l'",
    "backend=cudnn": (
        "unknown backend, choose from auto, reference, torch, triton, spconv, got 'cudnn'"
    ),
    "model=tiny": "a section of keys, not a value, got 'tiny'",
    "seed=-1": "should be greater than or equal to 0, got -1",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_named_with_its_key_and_remedy(override):
    message, key = refusal(override), override.partition("=")[0]
    assert message.startswith(f"config key {key}: ")
    assert message.endswith(WRONG[override])
    assert message.count("config key") == 1  # no second complaint about the same value


UNKNOWN = {  # key: what it was meant to be
    "sed": "seed",
    "decod": "decode",
    "mask_ratio": "mask.ratio",
    "batch_size": "data.batch_size",
    "lr": "train.lr",
    "steps": "train.steps",
    "mask.rato": "mask.ratio",
    "train.optimiser": "train.optimizer",
    "train.step": "train.steps",
    "train.batch_size": "data.batch_size",  # right key, wrong section
    "train.seed": "seed",
    "data.lr": "train.lr",
    "data.block_size": "mask.block_size",
    "trian.steps": "train",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named_with_what_it_was_meant_to_be(key):
    shown = key if key != "trian.steps" else "trian"
    assert refusal(f"{key}=1") == f"unknown config key {shown}: did you mean {UNKNOWN[key]}?"


def test_a_key_like_no_other_gets_the_list_of_its_section():
    assert refusal("mask.colour=1") == (
        "unknown config key mask.colour: choose from mask.ratio, mask.block_size"
    )
    assert "choose from seed, backend, decode, densify, sparse" in refusal("colour=1")
    assert "choose from model, mask, data, train" in refusal("colour.red=1")


def test_all_complaints_come_at_once():
    message = refusal("train.lr=-1", "data.workers=-1", "foo=1")
    assert message.count("; ") == 2
    assert all(key in message for key in ("train.lr", "data.workers", "foo"))


def test_missing_keys_are_named():
    with pytest.raises(UserError) as error:
        build_config(PretrainConfig, {"data": {"batch_size": 1}})
    assert str(error.value) == (
        "config key data.patch_size: missing, and it has no default; "
        "config key train: missing, and it has no default"
    )


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert refusal(source="tinny") == (
        "--config tinny: no such file, and no recipe of that name (recipes: s3d-resenc-l, tiny)"
    )
    assert "no such file" in refusal(source=tmp_path)
    for content in (b"train.steps = \n", b"[train]\nsteps = 1\nsteps = 2\n", b"\xff\xfe\x00"):
        file = tmp_path / "bad.toml"
        file.write_bytes(content)
        assert refusal(source=file).startswith(f"--config {file}: not valid TOML: ")


@pytest.mark.parametrize("item", ["train.steps", "=3", ""])
def test_an_override_without_key_or_value_is_refused(item):
    assert refusal(item) == f"--set {item}: expected key=value, such as train.steps=1000"


def test_an_override_into_a_value_is_refused():
    assert refusal("seed.x=3") == "--set seed.x=3: seed is a value, not a section"


def test_sections_below_sections_are_searched_too():
    class Inner(Strict):
        depth: int = 1

    class Middle(Strict):
        inner: Inner = Inner()

    class Outer(Strict):
        middle: Middle = Middle()

    for raw, key in (
        ({"middle": {"inner": {"dept": 1}}}, "middle.inner.dept"),
        ({"depth": 1}, "depth"),
        ({"middle": {"depth": 1}}, "middle.depth"),
    ):
        with pytest.raises(UserError, match=f"^unknown config key {re.escape(key)}: did you mean "):
            build_config(Outer, raw)
    with pytest.raises(UserError, match=r"^config key middle\.inner\.depth: should be a valid int"):
        build_config(Outer, {"middle": {"inner": {"depth": True}}})
