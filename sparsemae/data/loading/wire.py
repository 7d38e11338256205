"""Objects full of arrays from one process to another, with one copy of the arrays.

The arrays are written to a file in memory whose descriptor goes through the pipe; the receiver maps
it. Nothing has a name that could be left behind, and /dev/shm, small in containers, is not used.
"""

import mmap
import os
import pickle
import tempfile
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

_ALIGN = 64  # bytes


def send(pipe: Connection, value: Any, receiver: int) -> None:
    """Send a picklable object to the process `receiver` at the other end of a duplex pipe."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pipe.send((text, [view.nbytes for view in views]))
    if sum(view.nbytes for view in views):
        with _file() as file:
            for view in views:
                file.seek(_aligned(file.tell()))
                file.write(view)
            file.flush()
            reduction.send_handle(pipe, file.fileno(), receiver)


def receive(pipe: Connection) -> Any:
    """The object that `send` sent; its arrays are writable, and live in the memory it was sent in.

    EOFError or OSError if the other process has gone.
    """
    text, sizes = pipe.recv()
    views = [memoryview(bytearray())] * len(sizes)
    if sum(sizes):
        descriptor = reduction.recv_handle(pipe)
        try:
            whole = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)
        end = 0
        for i, size in enumerate(sizes):
            start = _aligned(end)
            end = start + size
            views[i] = whole[start:end]
    return pickle.loads(text, buffers=views)


def _file():
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("sparsemae"), "wb")
    return tempfile.TemporaryFile()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
