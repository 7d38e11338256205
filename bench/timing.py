"""Time of short operators, and what the machine can do at most, measured in the same run."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsemae.bench.harness import fastest_algorithms, seconds_in_turn

FLUSH_BYTES = 512 * 2**20  # written between runs on CUDA: no L2 cache is that large
LEAST, MOST = 3, 50  # rounds


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median, and the 20th and 80th percentile of the rounds."""

    ms: float
    ms_p20: float
    ms_p80: float
    rounds: int


@dataclass(frozen=True)
class Ceilings:
    """The fastest this machine does: TFLOP/s of a product, GB/s of a copy and of the L2 cache."""

    tflops: float
    gbps: float
    l2_gbps: float | None = None


H200 = Ceilings(790, 4300, 5500)  # bfloat16; what `--expect` reckons with
L2_GBPS = {"H100": 5500, "H200": 5500}  # not measured by this benchmark


def spread(seconds: list[float]) -> Spread:
    """Of the seconds that rounds took."""
    ordered = sorted(1e3 * s for s in seconds)
    return Spread(*(_quantile(ordered, q) for q in (0.5, 0.2, 0.8)), len(ordered))


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def time_operators(
    runs: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Spread]:
    """Time all of `runs` in turn, after runs that do not count, for about `seconds` altogether.

    On CUDA by events on the stream, with the L2 cache flushed before each run; launches overlap
    with the flush, and count where they take longer. On the CPU by the clock.
    """
    if device.type == "cuda":
        with fastest_algorithms():
            return _time_cuda(runs, seconds)
    once = sum(s[0] for s in seconds_in_turn(runs, device, 1, collect=False).values())
    taken = seconds_in_turn(runs, device, _rounds(seconds, once), collect=False)
    return {name: spread(s) for name, s in taken.items()}


def _rounds(seconds: float, once: float) -> int:
    return max(LEAST, min(MOST, round(seconds / max(once, 1e-9))))


def _time_cuda(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, Spread]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(2):  # compile, choose algorithms
        _cuda_round(runs, flush)
    once = sum(_cuda_round(runs, flush).values())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_rounds(seconds, once)):
        for name, s in _cuda_round(runs, flush).items():
            taken[name].append(s)
    return {name: spread(s) for name, s in taken.items()}


def _cuda_round(runs, flush) -> dict[str, float]:
    """Seconds of each run; waits for the device once, at the end."""
    events = {}
    for name, run in runs.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0
) -> tuple[Ceilings, dict[str, Spread]]:
    """A large product of random matrices in `dtype`, and a large copy; and how long they took."""
    cuda = device.type == "cuda"
    size, elements = (8192, 2**30) if cuda else (1024, 2**25)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    with _products_as_convolutions():
        timings = time_operators(runs, device, seconds)
    name = torch.cuda.get_device_name() if cuda else ""
    found = Ceilings(
        2 * size**3 / timings["matmul"].ms / 1e9,
        2 * 4 * elements / timings["copy"].ms / 1e6,
        next((gbps for chip, gbps in L2_GBPS.items() if chip in name), None),
    )
    return found, timings


@contextlib.contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Products of float32 in the precision convolutions of float32 use: TF32, unless told."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
