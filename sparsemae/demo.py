"""The main job on volumes drawn for the purpose, by the public commands alone."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sparsemae.data.phantom import write_heads
from sparsemae.errors import UserError

HEADS = 6
MARK = "made-by-sparsemae-demo.txt"  # written first: only a folder that has it is ever emptied
MADE = re.compile(
    rf"{re.escape(MARK)}|reconstruction\.(png|nii\.gz)"
    r"|volumes/head_\d+\.nii\.gz"
    r"|store/(index\.json|(failures|warnings)\.jsonl|dataset\.html|contact\.png|\.lock)"
    r"(\.[0-9a-f]+\.tmp)?"
    r"|store/\.journal/(config\.json(\.[0-9a-f]+\.tmp)?|whole\.jsonl)"
    r"|store/cases/head_\d+\.b2nd(\.[0-9a-f]+\.tmp)?"
    r"|run/(config\.toml|status\.json|report\.html|preview\.(npz|png))(\.[0-9a-f]+\.tmp)?"
    r"|run/(metrics|timing)\.jsonl(\.[0-9a-f]+\.tmp)?|run/(history\.jsonl|\.lock)"
    r"|run/checkpoints/(\.(tmp|del)-)?step-\d+/((model|optimizer)\.safetensors|meta\.json)"
)


def run_demo(folder: Path, *, overwrite: bool = False) -> None:
    """Draw heads as NIfTI files, then preprocess, pretrain and reconstruct in `folder`.

    Raises:
        UserError: The folder holds something already, and it may not be replaced.
    """
    _make_room(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("`sparsemae demo --overwrite` may remove what is in this folder.\n")
    start = time.monotonic()
    print(f"drawing {HEADS} head-like volumes into {folder / 'volumes'}", flush=True)
    heads = write_heads(folder / "volumes", HEADS)
    store, run, picture = folder / "store", folder / "run", folder / "reconstruction.png"
    _sparsemae("preprocess", folder / "volumes", "-o", store, "--spacing", "keep")
    _sparsemae("pretrain", store, "-o", run, "--config", "tiny")
    _sparsemae("reconstruct", run, heads[0], "-o", picture)
    print(f"\ndone in {time.monotonic() - start:.0f} s. Open {picture}:")
    print("original, masked input and reconstruction, in three planes.")


def _make_room(folder: Path, overwrite: bool) -> None:
    """Empty `folder` of an earlier demo, if that is all it holds and it may go."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another -o")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        raise UserError(f"{folder} holds files that are not from a demo: choose another -o")
    if not overwrite:
        raise UserError(f"{folder} holds an earlier demo: choose another -o, or --overwrite")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not MADE.fullmatch(name):
            raise UserError(
                f"{folder} holds {name}, not from a demo: move it, or choose another -o"
            )
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sparsemae(*arguments: str | Path) -> None:
    words = [str(a) for a in arguments]
    print(f"\n$ sparsemae {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "sparsemae", *words])
    if done.returncode:
        raise SystemExit(done.returncode)
