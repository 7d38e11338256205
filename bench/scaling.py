"""What a training step costs on several ranks: with the all-reduce of its gradients, and without.

torchrun --standalone --nproc-per-node 2 -m sparsemae.bench.scaling --config tiny --json FILE

Every rank computes as much, so without the all-reduce a step would take as long as on one.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from sparsemae.bench.harness import append_json, machine
from sparsemae.config import load_config
from sparsemae.models.mae import masked_error
from sparsemae.pretraining.config import PretrainConfig, build_mae
from sparsemae.training.optimizer import make_optimizer
from sparsemae.training.options import autocast
from sparsemae.training.ranks import Ranks, join_ranks

BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel reduces together
TOLERANCE = 1e-4  # of averaged gradients, relative to the largest


class Step:
    """A training step on random patches; the ranks have different ones."""

    def __init__(self, config: PretrainConfig, batch: int, ranks: Ranks):
        self.mae = build_mae(config).to(ranks.device)
        self.ranks, self.config, self.called = ranks, config, ranks.wrap(self.mae)
        size, generator = config.data.patch_size, torch.Generator().manual_seed(ranks.rank)
        self.x = torch.randn(batch, 1, *size, generator=generator).to(ranks.device)
        masks = self.mae.draw_masks(batch, size, config.mask.typical, generator=generator)
        self.masks = masks.to(ranks.device)
        self.parameters = [p for p in self.mae.parameters() if p.requires_grad]
        self.optimizer = make_optimizer({"all": self.parameters}, config.train)
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=ranks.device)
        self.backward_seconds: list[float] = []

    def gradients(self, *, reduced: bool) -> None:
        """Forward and backward, with or without the ranks' mean of the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.called.no_sync() if self.ranks.many and not reduced else nullcontext():
            with autocast(self.config.train.precision, self.ranks.device):
                out = self.called(self.x, self.masks)
                loss, _ = masked_error(out, self.x, self.masks.scored)
            start = self.now()
            loss.backward()
        if not reduced:
            self.backward_seconds.append(self.now() - start)

    def run(self, *, reduced: bool) -> None:
        self.gradients(reduced=reduced)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm, foreach=True)
        self.optimizer.step()

    def reduce(self) -> None:
        """The all-reduce alone, in buckets as in a step, one after another."""
        for bucket in self.flat.split(BUCKET // 4):
            self.ranks.total(bucket)

    def now(self) -> float:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def check(self) -> None:
        """RuntimeError unless a step's gradients are the mean of those of the ranks."""
        self.gradients(reduced=False)
        own = torch.cat([p.grad.flatten() for p in self.parameters])
        mean = self.ranks.total(own) / self.ranks.world_size
        self.gradients(reduced=True)
        found = torch.cat([p.grad.flatten() for p in self.parameters])
        error = ((found - mean).abs().max() / mean.abs().max()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"gradients differ from the mean of the ranks' by {error:.1e}")


def in_turn(step: Step, works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of the slowest rank; all start together, the first round is left out."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for done in range(rounds + 1):
        for name, work in works.items():
            if step.ranks.many:
                dist.barrier()
            start = step.now()
            work()
            seconds = torch.tensor(step.now() - start, device=step.ranks.device)
            if step.ranks.many:
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if done:
                taken[name].append(1e3 * seconds.item())
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(config: PretrainConfig, batch: int, rounds: int, ranks: Ranks) -> dict[str, object]:
    """A record; `predicted_ms` is what docs/cluster.md says of these numbers."""
    step, n = Step(config, batch, ranks), ranks.world_size
    if ranks.many:
        step.check()
    works = {"local": lambda: step.run(reduced=False)}
    if ranks.many:
        works |= {"step": lambda: step.run(reduced=True), "reduce": step.reduce}
    ms = in_turn(step, works, rounds)
    local, reduce = ms["local"], ms.get("reduce", 0.0)
    backward = 1e3 * statistics.median(step.backward_seconds[-rounds:])
    size = 4 * step.flat.numel()
    shown = max(reduce - backward, reduce * min(1, BUCKET / size))
    return {
        **{"case": "scaling", "ranks": n, "batch": batch, "preset": config.model.preset},
        **{"patch": config.data.patch_size[0], "precision": config.train.precision},
        "gradient_mb": size / 1e6,
        "step_ms": ms.get("step", local),
        "local_ms": local,
        "backward_ms": backward,
        "reduce_ms": reduce,
        "bus_gb_per_second": 2 * (n - 1) / n * size / reduce / 1e6 if reduce else None,
        "predicted_ms": local + shown,
        "nothing_hidden_ms": local + reduce,
    }


def main(
    config: Annotated[str, typer.Option(help="Recipe or file.")] = "tiny",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of each rank.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 15,
    file: Annotated[Path | None, typer.Option("--json", help="File to append it to.")] = None,
) -> None:
    """Time a training step on the ranks that torchrun started; one JSON line."""
    loaded = load_config(PretrainConfig, config, overrides or [])
    with join_ranks(loaded.train.device) as ranks:
        row = measure(loaded.resolved(), batch, rounds, ranks) | machine(ranks.device)
        if ranks.main:
            print(json.dumps(row))
            if file is not None:
                append_json(file, [row])


if __name__ == "__main__":
    typer.run(main)
