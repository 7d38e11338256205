"""Runs `sparsemae` commands in children forked from a process that has imported everything.

A command starts in milliseconds so, and can be killed often. Reads JSON lines: {"argv", "out",
"slow", "largest", "memory"} starts a child in a process group of its own and answers its pid;
{"wait": pid} answers its exit code, negative for a signal.

slow: seconds that half a file of a checkpoint takes; looking at a case, preparing it, a validation
    and a report take 0.1, and while they go on there is a file `out`.looking, .preparing,
    .validation or .report.
largest: bytes that no file may grow beyond. memory: bytes of address space beside what is used.
"""

import json
import os
import resource
import sys
import threading
import time
import traceback
from pathlib import Path

import matplotlib.figure
import torch
import torch._dynamo  # an optimiser imports it

from sparsemae import checkpoint, cli, files, finetune, pretrain, reconstruct, report
from sparsemae.finetuning.objective import Segmentation
from sparsemae.planning import fingerprint
from sparsemae.pretraining.objective import Objective
from sparsemae.segmentation import making

assert matplotlib
assert finetune
assert pretrain
assert reconstruct


def child(argv, out, slow, largest, memory):
    os.setsid()
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if slow:
        checkpoint.write_synced = slowly(slow)
        fingerprint.read_case = marked(Path(f"{out}.looking"), fingerprint.read_case)
        making.write_case = marked(Path(f"{out}.preparing"), making.write_case)
        for kind in (Objective, Segmentation):
            kind.validate = marked(Path(f"{out}.validation"), kind.validate)
        report.write_run_report = marked(Path(f"{out}.report"), report.write_run_report)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    sys.argv = ["sparsemae", *argv]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    for thread in threading.enumerate():  # as the interpreter does when it ends
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    os._exit(code)


def slowly(seconds):
    def write(path, data):
        time.sleep(seconds)
        half = len(data) // 2
        path.write_bytes(data[:half])
        time.sleep(seconds)
        files.write_synced(path, data)

    return write


def marked(mark, work):
    """`work`, taking longer, with a file that is there while it goes on."""

    def call(*arguments, **options):
        mark.touch()
        time.sleep(0.1)
        try:
            return work(*arguments, **options)
        finally:
            mark.unlink()

    return call


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                child(**request)
        print(answer, flush=True)


main()
