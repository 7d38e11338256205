"""Run by torchrun: `pretrain` as the command does it, and what each rank saw, into a file.

rank_driver.py STORE RUN SEEN KEY=VALUE...
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from sparsemae.config import load_config
from sparsemae.pretrain import PretrainConfig, pretrain
from sparsemae.pretraining.objective import Objective


def main():
    torch.set_num_threads(1)
    store, run, seen, *overrides = sys.argv[1:]
    records = {}
    loss_of = Objective.loss_of

    def watched(self, model, batch, step):
        first = step * self.config.data.batch_size
        masks = self._masks([first + s for s in batch["slots"]], self._ratio(step), 0)
        for i, slot in enumerate(batch["slots"]):
            content = batch["image"][i].numpy().tobytes() + batch["excluded"][i].numpy().tobytes()
            visible = masks.visible.visible[i].numpy().tobytes()
            what = batch["case"][i], *(hashlib.sha256(b).hexdigest() for b in (content, visible))
            records[f"{step} {slot}"] = what
        return loss_of(self, model, batch, step)

    Objective.loss_of = watched
    config = load_config(PretrainConfig, "tiny", overrides)
    pretrain(Path(store), Path(run), config, resume=True)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "it may abort when Python ends"
    Path(f"{seen}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(records))


main()
