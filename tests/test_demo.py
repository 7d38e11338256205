"""The demo: the public commands in order, and a folder that is never emptied of foreign files."""

import pytest

from sparsemae import demo
from sparsemae.data.phantom import write_heads
from sparsemae.demo import MARK, run_demo
from sparsemae.errors import UserError

FILES = (  # what the three commands leave
    "store/index.json",
    "store/cases/head_00.b2nd",
    "run/config.toml",
    "run/metrics.jsonl",
    "run/checkpoints/step-00000200/model.safetensors",
    "run/checkpoints/step-00000200/optimizer.safetensors",
    "run/checkpoints/step-00000200/meta.json",
    "reconstruction.png",
    "reconstruction.nii.gz",
)


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that the demo in `tmp_path / "demo"` would run; they leave empty files."""
    called = []

    def command(name, *arguments):
        called.append((name, *map(str, arguments)))
        if name == "reconstruct":
            for file in FILES:
                path = tmp_path / "demo" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    monkeypatch.setattr(demo, "_sparsemae", command)
    monkeypatch.setattr(demo, "write_heads", lambda folder, n: write_heads(folder, n, size=16))
    return called


def names(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_the_demo_is_the_three_commands(tmp_path, commands, capfd):
    folder = tmp_path / "demo"
    run_demo(folder)
    store, run = f"{folder}/store", f"{folder}/run"
    assert commands == [
        ("preprocess", f"{folder}/volumes", "-o", store, "--spacing", "keep"),
        ("pretrain", store, "-o", run, "--config", "tiny"),
        (
            *("reconstruct", run, f"{folder}/volumes/head_00.nii.gz"),
            *("-o", f"{folder}/reconstruction.png"),
        ),
    ]
    assert f"Open {folder}/reconstruction.png" in capfd.readouterr().out
    assert len(list((folder / "volumes").iterdir())) == demo.HEADS


def test_an_earlier_demo_is_replaced_only_when_asked(tmp_path, commands):
    folder = tmp_path / "demo"
    run_demo(folder)
    before = names(folder)
    with pytest.raises(UserError, match="holds an earlier demo: choose another -o, or --overwrite"):
        run_demo(folder)
    assert names(folder) == before
    run_demo(folder, overwrite=True)
    assert names(folder).keys() == before.keys()
    assert names(folder)["reconstruction.png"] > before["reconstruction.png"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "volumes/patient_01.nii.gz",
        "volumes/head_00.nii.gz/hidden",
        "store/index.json",  # somebody's own store, run or picture
        "run/config.toml",
        "reconstruction.png",
    ],
)
def test_a_folder_that_is_not_from_a_demo_is_never_touched(tmp_path, commands, foreign, overwrite):
    path = tmp_path / "demo" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = names(tmp_path)
    with pytest.raises(UserError, match="not from a demo: choose another -o"):
        run_demo(tmp_path / "demo", overwrite=overwrite)
    assert names(tmp_path) == before
    assert commands == []


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "volumes/patient_01.nii.gz",
        "run/checkpoints/step-00000200/notes.txt",
        "run/checkpoints/step-00000200-best/model.safetensors",
        "store/cases/patient_01.b2nd",
        "store/mine/index.json",
    ],
)
def test_what_was_put_into_a_demo_is_not_deleted(tmp_path, commands, foreign):
    folder = tmp_path / "demo"
    run_demo(folder)
    path = folder / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = names(tmp_path)
    with pytest.raises(UserError, match=f"holds {foreign}, not from a demo: move it"):
        run_demo(folder, overwrite=True)
    assert names(tmp_path) == before


def test_a_link_in_a_demo_is_neither_followed_nor_removed(tmp_path, commands):
    folder, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    run_demo(folder)
    elsewhere.mkdir()
    (elsewhere / "head_00.nii.gz").write_text("mine")
    (folder / "run" / "volumes").symlink_to(elsewhere)
    with pytest.raises(UserError, match="holds run/volumes, not from a demo"):
        run_demo(folder, overwrite=True)
    assert (elsewhere / "head_00.nii.gz").read_text() == "mine"


def test_a_demo_cut_short_can_be_replaced(tmp_path, commands):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / MARK).touch()
    run_demo(folder, overwrite=True)
    assert len(commands) == 3


def test_a_file_in_its_place_is_refused(tmp_path, commands):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(UserError, match="is a file: choose another -o"):
        run_demo(tmp_path / "demo", overwrite=True)
