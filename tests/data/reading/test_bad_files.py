"""Every class of bad file: its code, one line, and what it may cost in time and memory."""

import json
import subprocess
import sys

import pytest

# ru_maxrss is the most the process ever held, so one process per file: its growth is the file's.
COST = """
import json, os, resource, sys, time
from sparsemae.data.read import read_volume
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
read_volume(sys.argv[1])
for path in sys.argv[2:]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is held now
        before, began = peak(), time.process_time()
        try:
            read_volume(path)
            code = "accepted"
        except Exception as error:
            code = getattr(error, "code", repr(error))
        print(json.dumps([code, time.process_time() - began, peak() - before]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
MAX_SECONDS, MAX_MIB = 2.0, 200.0


def test_it_is_refused_under_its_code(tmp_path, bad, refused):
    code, make = bad
    path = tmp_path / "case one.nii.gz"
    make(path)
    refused(path, code)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are reset through /proc")
def test_none_costs_much(tmp_path, bad_files, put):
    """Of processor time and resident memory, in a fork of a process that has read one volume."""
    paths = []
    for i, (_, make) in enumerate(bad_files.values()):
        paths.append(tmp_path / f"{i}.nii.gz")
        make(paths[-1])
    good = put(tmp_path / "good.nii.gz")
    done = subprocess.run(
        [sys.executable, "-c", COST, good, *paths], capture_output=True, text=True, check=True
    )
    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(costs) == len(paths)
    for (name, (code, _)), (got, seconds, mib) in zip(bad_files.items(), costs, strict=True):
        assert got == code, name
        assert seconds < MAX_SECONDS, f"{name}: {seconds:.2f} s"
        assert mib < MAX_MIB, f"{name}: {mib:.0f} MiB"
