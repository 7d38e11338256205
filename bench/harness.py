"""Time, peak memory and the machine they belong to.

Variants that are compared are timed in turn, round after round, in one process, so that a noisy
machine slows all of them alike. Peak memory is taken in a fresh process per variant.
"""

import contextlib
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and the fastest and slowest round."""

    ms: float
    ms_min: float
    ms_max: float


def time_in_turn(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Timing]:
    """Run every variant once per round, after one round that does not count."""
    with fastest_algorithms():
        seconds = seconds_in_turn(variants, device, rounds, on_round)
    return {
        name: Timing(*(1e3 * f(s) for f in (statistics.median, min, max)))
        for name, s in seconds.items()
    }


def seconds_in_turn(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    on_round: Callable[[int], None] = lambda done: None,
    *,
    collect: bool = True,
) -> dict[str, list[float]]:
    """What each counted round of each variant took; `collect` garbage before each run."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(rounds + 1):
        for name, run in variants.items():
            if collect:
                gc.collect()
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if done:
                seconds[name].append(time.perf_counter() - start)
        on_round(done)
    return seconds


def peak_mib(build: Callable[..., Callable[[], object]], device: torch.device, *args) -> float:
    """Peak memory in MiB of two runs of `build(*args)()`, what it builds included.

    Resident memory of a fresh process on the CPU; tensors of this process on CUDA.
    """
    if device.type == "cuda":
        return _peak_cuda(build, args)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(send, build, args))
    process.start()
    send.close()
    try:
        peak = receive.recv()
    except EOFError:
        raise RuntimeError(f"the process measuring {args} died: out of memory?") from None
    finally:
        process.join()
    return peak


def _peak_cuda(build, args) -> float:
    release_memory()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with fastest_algorithms():
        run = build(*args)
        run()
        run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _measure_peak(send, build, args) -> None:
    torch.ones(1).sum().item()  # the libraries' own memory does not count
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    run = build(*args)
    run()
    run()
    send.send(_status("VmHWM") - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def fastest_algorithms() -> Iterator[None]:
    """cuDNN tries its algorithms at the first call of each shape: its best, as a rival deserves."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device) -> dict[str, object]:
    """What a reader needs to judge or repeat a number."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return os.environ.get("COMMIT", "unknown")  # of a copy without its history


def append_json(path: Path, rows: list[dict[str, object]]) -> None:
    """One JSON object per line, added to what the file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def release_memory() -> None:
    """Hand freed memory back, so that one variant does not profit from another's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
