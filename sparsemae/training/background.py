"""One piece of work beside the training, such as writing what was copied from the device."""

import threading
from collections.abc import Callable


class Background:
    """Runs one job at a time in a thread; what it raises is raised by the next call."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a call would raise."""
        return self._error is not None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, then start this one."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        # no daemon: what has been started is written, also when the interpreter ends
        self._thread = threading.Thread(target=run, name="sparsemae-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job, and raise what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
