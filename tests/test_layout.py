"""The rooms of the project, who may import whom, and that a wheel of it stands on its own."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "sparsemae": {"kernels", "sparsemae"},
    "bench": {"kernels", "sparsemae", "bench"},
    "tests": {"kernels", "sparsemae", "bench"},
}
INSTALLED = [name for name in MAY_IMPORT if name != "tests"]
LONGEST = 400


def files(*rooms: str):
    return [path for name in rooms for path in sorted((ROOT / name).rglob("*.py"))]


def room(module: str) -> str | None:
    """The room an absolute import lands in; None for a third party."""
    first, _, rest = module.partition(".")
    if first != "sparsemae":
        return f"bare name {first}" if first in MAY_IMPORT else None
    second = rest.partition(".")[0]
    return second if second in MAY_IMPORT else "sparsemae"


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_rooms_import_downwards_only(name):
    assert files(name)
    for path in files(name):
        found = {room(module) for module in imports(path)} - {None}
        wrong = found - MAY_IMPORT[name]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_importer_sees_what_it_looks_for(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("import kernels.mask\ndef f():\n    from sparsemae.bench import step\n")
    assert [room(m) for m in imports(source)] == ["bare name kernels", "bench"]
    source.write_text("from . import mask\n")
    with pytest.raises(AssertionError, match="imports here are absolute"):
        list(imports(source))


def test_every_folder_of_code_is_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).parts for path in files(*INSTALLED)}
    names = {".".join(f if f[0] == "sparsemae" else ("sparsemae", *f)) for f in folders}
    assert names == set(setuptools["packages"])


@pytest.mark.parametrize("path", files(*MAY_IMPORT), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def python(*args: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    """What a commit of everything would hold: no build folder, no cache."""
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():  # listed, but perhaps deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_wheel(tmp_path):
    """Built offline, it installs sparsemae/ and nothing else, and runs from an empty folder."""
    tree, target, empty = copy_of_the_tree(tmp_path / "tree"), tmp_path / "target", tmp_path / "cwd"
    empty.mkdir()
    offline = ("--no-deps", "--no-index", "-q")
    python("-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", "..", ".", cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert {n.split("/")[0] for n in names} == {"sparsemae", f"sparsemae-{version}.dist-info"}
    assert {"sparsemae/py.typed", "sparsemae/kernels/tiles.toml"} <= set(names)
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "sparsemae/recipes").rglob("*.toml")}
    recipes |= {str(p.relative_to(ROOT)) for p in (ROOT / "sparsemae/suites").glob("*.toml")}
    assert recipes <= set(names)
    modules = {"/".join(p.relative_to(ROOT).parts) for p in files(*INSTALLED)}
    modules = {m if m.startswith("sparsemae/") else f"sparsemae/{m}" for m in modules}
    assert modules == {n for n in names if n.endswith(".py")}

    python("-m", "pip", "install", *offline, "--target", str(target), str(wheel), cwd=empty)
    code = "import sparsemae, sparsemae.kernels, sparsemae.bench as bench\n" + "".join(
        f"print({m}.__file__)\n" for m in ("sparsemae", "sparsemae.kernels", "bench")
    )
    found = python("-c", code, cwd=empty, PYTHONPATH=str(target)).split()
    assert [Path(f).parent for f in found] == [
        target / "sparsemae" / sub for sub in ("", "kernels", "bench")
    ]
