"""The main job on volumes drawn for the purpose, by the public commands alone."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sparsemae.data.phantom import write_heads
from sparsemae.errors import UserError

MADE = ("volumes", "store", "run", "reconstruction.png", "reconstruction.nii.gz")
HEADS = 6


def run_demo(folder: Path, *, overwrite: bool = False) -> None:
    """Draw heads as NIfTI files, then preprocess, pretrain and reconstruct in `folder`.

    Raises:
        UserError: The folder holds something already, and it may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another -o")
    found = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if strange := [name for name in found if name not in MADE]:
        raise UserError(f"{folder} holds {strange[0]}, not from a demo: choose another -o")
    if found and not overwrite:
        raise UserError(f"{folder} holds an earlier demo: choose another -o, or --overwrite")
    for name in found:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    start = time.monotonic()
    print(f"drawing {HEADS} head-like volumes into {folder / 'volumes'}", flush=True)
    heads = write_heads(folder / "volumes", HEADS)
    store, run, picture = folder / "store", folder / "run", folder / "reconstruction.png"
    _sparsemae("preprocess", folder / "volumes", "-o", store, "--spacing", "keep")
    _sparsemae("pretrain", store, "-o", run, "--config", "tiny")
    _sparsemae("reconstruct", run, heads[0], "-o", picture)
    print(f"\ndone in {time.monotonic() - start:.0f} s. Open {picture}:")
    print("original, masked input and reconstruction, in three planes.")


def _sparsemae(*arguments: str | Path) -> None:
    words = [str(a) for a in arguments]
    print(f"\n$ sparsemae {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "sparsemae", *words])
    if done.returncode:
        raise SystemExit(done.returncode)
