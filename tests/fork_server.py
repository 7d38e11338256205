"""Runs `sparsemae` commands in children forked from a process that has imported everything.

A command starts in milliseconds so, and can be killed often. Reads JSON lines: {"argv", "out",
"hold", "largest", "memory"} starts a child in a process group of its own and answers its pid;
{"wait": pid} answers its exit code, negative for a signal.

hold: [place, n]: when the command comes to a place of hold.py for the n-th time, counted from 0, it
    stands still while there is a file `out`.held.
largest: bytes that no file may grow beyond. memory: bytes of address space beside what is used.
"""

import json
import os
import resource
import sys
import threading
import traceback
from pathlib import Path

import matplotlib.figure
import torch
import torch._dynamo  # an optimiser imports it
from hold import hold_at

from sparsemae import cli, finetune, pretrain, reconstruct, report

assert matplotlib
assert finetune
assert pretrain
assert reconstruct
assert report


def child(argv, out, hold, largest, memory):
    os.setsid()
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if hold:
        hold_at(*hold, Path(f"{out}.held"))
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
