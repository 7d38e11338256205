"""Run by torchrun: a `sparsemae` command, and what each rank trained with, into a file.

rank_driver.py SEEN WORDS...
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from sparsemae import cli
from sparsemae.finetuning.objective import Segmentation
from sparsemae.training import run


def main():
    torch.set_num_threads(1)
    seen = sys.argv.pop(1)
    records = {"samples": {}}
    loss_of, fit = Segmentation.loss_of, run.fit

    def watched(self, model, batch, step):
        for i, slot in enumerate(batch["slots"]):
            what = batch["case"][i], digest(batch["image"][i]), digest(batch["labels"][i])
            records["samples"][f"{step} {slot}"] = what
        return loss_of(self, model, batch, step)

    def watched_fit(state, *arguments, **options):
        records["start"] = weights(state)
        records["encoder"] = [
            sum(float(p.detach().double().abs().sum()) for p in model.encoder.parameters())
            for model in (state.model, state.ema.model)
        ]
        finished = fit(state, *arguments, **options)
        records["end"] = weights(state)
        return finished

    Segmentation.loss_of, run.fit = watched, watched_fit
    try:
        cli.main()
    finally:
        Path(f"{seen}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(records))


def weights(state):
    """Of the network and its average."""
    return {
        name: digest(torch.cat([p.detach().flatten() for p in model.parameters()]))
        for name, model in (("network", state.model), ("average", state.ema.model))
    }


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


main()
