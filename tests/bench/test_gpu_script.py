"""The script for a GPU machine, as far as it runs without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
# the first module that starts tells the import system that some others are not there
LACKS = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Lacking())
"""


def test_it_is_a_script():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_kernels_tests_need_no_package_that_it_calls_optional(tmp_path):
    """Nor does what pytest loads with them."""
    named = re.search(r"needs='(.*)'", SCRIPT.read_text()).group(1).split(", ")
    assert "nibabel" in named
    lacking = [*named, "monai"]
    (tmp_path / "sitecustomize.py").write_text(LACKS.format(lacking=set(lacking)))
    files = [
        p for p in (ROOT / "tests" / "kernels").glob("test_*.py") if "mark.gpu" in p.read_text()
    ]
    assert files
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *files]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_gpu.py::" in done.stdout
