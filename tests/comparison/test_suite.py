"""A suite file is understood, and all that is wrong with it is said in time."""

import shutil
import tomllib
from pathlib import Path

import pytest

import sparsemae
from sparsemae.comparison.suite import read_suite
from sparsemae.errors import UserError


def test_paths_are_those_beside_the_file(suite_file, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    suite = read_suite(suite_file)
    assert [d.name for d in suite.datasets] == ["stroke", "tumour"]
    assert [m.name for m in suite.methods] == ["scratch", "mae"]
    stroke, tumour = suite.datasets
    data = tmp_path / "data"
    assert suite.labels(stroke) == data / "Dataset001_Stroke" / "labelsTr"
    assert suite.labels(tumour) == data / "Dataset002_Tumour" / "labelsTs"
    assert suite.config(suite.methods[1]) == str(tmp_path / "fast.toml")
    assert suite.config(suite.methods[0]) is None
    assert suite.methods[1].set == ("train.steps=10", "data.batch_size=2")
    assert (suite.options.folds, tumour.folds) == ((0,), (1,))


def test_a_recipe_is_a_name(suite_file):
    change(suite_file, 'config = "fast.toml"', 'config = "scratch"')
    suite = read_suite(suite_file)
    assert suite.config(suite.methods[1]) == "scratch"


def test_all_that_is_missing_is_said_at_once(suite_file, tmp_path):
    change(suite_file, "Dataset001_Stroke", "Dataset009_Gone")
    change(suite_file, 'role = "development"', 'role = "development"\nsource = "https://a.b"')
    (tmp_path / "pretrained").rmdir()
    (tmp_path / "fast.toml").unlink()
    (tmp_path / "data" / "Dataset002_Tumour" / "labelsTs").rmdir()
    with pytest.raises(UserError) as error:
        read_suite(suite_file)
    said = str(error.value)
    assert "\n" not in said
    for part in ("stroke: ", "Dataset009_Gone", "https://a.b", "labelsTs is missing"):
        assert part in said
    assert f"init: {tmp_path / 'pretrained'} is missing" in said
    assert "fast.toml, nor a recipe (" in said


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("role =", "rolle =", r"\[\[datasets\]\] 1 \(stroke\): .*rolle: did you mean role\?"),
        ("seeds =", "seds =", r"\[suite\]: unknown config key seds: did you mean seeds\?"),
        ('set = ["', 'sett = ["', r"\[\[methods\]\] 2 \(mae\): .*did you mean set\?"),
        ("[suite]", "[suit]", r"unknown table suit; there are suite, datasets, methods"),
        ('"development"', '"training"', r"role: .*'development' or 'test'.*got 'training'"),
        ('"stroke"', '"a/b"', r"name: use letters, digits"),
        ('"stroke"', '".."', r"name: use letters, digits"),
        ('"stroke"', '"Tumour"', r"two datasets are named tumour; rename one"),
        ('"mae"', '"scratch"', r"two methods are named scratch"),
        ("seeds = [0, 1]", "seeds = [0, 0]", r"seeds: one of them twice"),
        ("seeds = [0, 1]", "seeds = []", r"seeds: "),
        ("seeds = [0, 1]", "seeds = [-1]", r"seeds: "),
        ("seeds = [0, 1]", "seeds = [true]", r"seeds: "),
        ("train.steps=10", "train.steps", r"set: write key=value"),
        ("train.steps=10", "seed=3", r"set: seed has a key of its own in the suite"),
        ("train.steps=10", "fold = 1", r"set: fold has a key of its own"),
        ('init = "none"', "", r"\[\[methods\]\] 1 \(scratch\): config key init: missing"),
        ('name = "heads"', 'name = "heads', r"not valid TOML"),
    ],
)
def test_faults_name_their_place(suite_file, before, after, said):
    change(suite_file, before, after)
    with pytest.raises(UserError, match=said):
        read_suite(suite_file)


@pytest.mark.parametrize("kind", ["datasets", "methods"])
def test_a_suite_without_them(suite_file, kind):
    lines = suite_file.read_text().split("[[")
    suite_file.write_text("[[".join(part for part in lines if not part.startswith(kind)))
    with pytest.raises(UserError, match=rf"no {kind}; add a table \[\[{kind}\]\]"):
        read_suite(suite_file)


def test_one_method_is_no_comparison(suite_file):
    text = suite_file.read_text()
    suite_file.write_text(text[: text.rindex("[[methods]]")])
    with pytest.raises(UserError, match="one method alone"):
        read_suite(suite_file)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_suite(tmp_path / "suite.toml")


def test_labels_may_lie_elsewhere(suite_file, tmp_path):
    (tmp_path / "data" / "Dataset002_Tumour" / "labelsTs").rename(tmp_path / "truth")
    change(suite_file, 'evaluate_on = "test"', 'evaluate_on = "test"\nlabels = "truth"')
    suite = read_suite(suite_file)
    assert suite.labels(suite.datasets[1]) == tmp_path / "truth"


def change(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def test_the_suite_that_is_shipped_fits_the_keys(suite_file, tmp_path):
    """With folders of its names it is read; without, it says which there are none of."""
    shipped = Path(sparsemae.__file__).parent / "suites" / "s3d.toml"
    file = tmp_path / "s3d.toml"
    shutil.copy(shipped, file)
    with pytest.raises(UserError, match=r"data set brain-mets: .*data set t2-aneurysms: .*init: "):
        read_suite(file)
    for entry in tomllib.loads(file.read_text())["datasets"]:
        shutil.copytree(tmp_path / "data" / "Dataset001_Stroke", tmp_path / entry["path"])
    (tmp_path / "runs" / "s3d-resenc-l").mkdir(parents=True)
    roles = [d.role for d in read_suite(file).datasets]
    assert roles == ["development"] * 2 + ["test"] * 2


def test_the_suite_of_the_document_fits_the_keys(suite_file, tmp_path):
    document = Path(__file__).parents[2] / "docs" / "compare.md"
    text = document.read_text().split("```toml\n")[1].split("```")[0]
    suite_file.write_text(text)
    (tmp_path / "fast.toml").write_text("[train]\nsteps = 3\n")
    (tmp_path / "truth" / "tumour").mkdir(parents=True)
    (tmp_path / "runs" / "mae").mkdir(parents=True)
    for name in ("Dataset001_Stroke", "Dataset002_Tumour"):
        (tmp_path / "data" / name).rename(tmp_path / name)
    suite = read_suite(suite_file)
    assert suite.labels(suite.datasets[1]) == tmp_path / "truth" / "tumour"
    assert suite.datasets[1].folds == (0, 1)


def test_keys_of_a_method_are_checked_before_anything_runs(suite_file, tmp_path):
    """Those of `set`, and those in its configuration file."""
    change(suite_file, "train.steps=10", "train.step=10")
    with pytest.raises(UserError, match=r"method mae: .*train\.step: did you mean train\.steps\?"):
        read_suite(suite_file)
    change(suite_file, "train.step=10", "train.steps=10")
    (tmp_path / "fast.toml").write_text("[train]\nstep = 3\n")
    with pytest.raises(UserError, match=r"method mae: .*train\.step"):
        read_suite(suite_file)
