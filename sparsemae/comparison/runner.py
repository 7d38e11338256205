"""Jobs run one after the other, each in processes of its own; whatever ends them, they go on later.

`job.json` in a job's folder tells its definition, which stages are done, and how the last attempt
ended. A lock beside it keeps two processes out of one job.
"""

import contextlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsemae.comparison.jobs import STAGES, Job, commands
from sparsemae.data.codes import one_line
from sparsemae.errors import UserError, listed
from sparsemae.files import is_locked, locked, write_atomically
from sparsemae.live import LiveLine
from sparsemae.signals import INTERRUPTED, PREEMPTED

RECORD, LOG, LOCK = "job.json", "log.txt", ".lock"
FINISHED, FAILED, RUNNING = "finished", "failed", "running"  # states
STOPPED, WAITING = "stopped", "waiting"
IN_USE, SKIPPED = "in use", "skipped"
SOME_FAILED = 3  # exit code
_POLL = 0.05  # seconds between looks at a child and at what was asked
_PATIENCE = 600.0  # seconds that a child has to end after a stop signal
_TAIL = 4096  # bytes of a log that its last line is looked for in


@dataclass
class Outcome:
    """How a call went."""

    code: int = 0  # exit code
    counts: Counter = field(default_factory=Counter)  # of FINISHED, FAILED, IN_USE, SKIPPED
    messages: list[str] = field(default_factory=list)


def state(job: Job) -> str:
    """Where a job stands: FINISHED only if its result is there and of the same definition."""
    found = read_record(job)
    if found is None:
        return WAITING
    if found.get("state") == FINISHED:
        return FINISHED if _same(job, found) and job.metrics.is_file() else WAITING
    if found.get("state") == RUNNING and not is_locked(job.folder / LOCK):
        return STOPPED  # killed
    return str(found.get("state"))


def read_record(job: Job) -> dict[str, Any] | None:
    """`job.json`; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((job.folder / RECORD).read_bytes())
        if isinstance(found, dict) and isinstance(found.get("definition"), dict):
            return found
    return None


def check_same(jobs: Sequence[Job]) -> None:
    """Refuse to go on with folders that another definition of a job has made.

    Raises:
        UserError: Names the first and what differs: results of two definitions do not mix.
    """
    others = [(job, found) for job in jobs if (found := read_record(job)) and not _same(job, found)]
    if not others:
        return
    job, found = others[0]
    names = listed([job.id for job, _ in others], 1)
    now, before = job.definition, found["definition"]
    keys = [key for key in now if now[key] != before.get(key)]
    raise UserError(
        one_line(
            f"job {names}: made with another {', '.join(keys) or 'definition'}; choose "
            f"another -o, or remove {job.folder} and {job.run}"
        )
    )


def run_jobs(
    jobs: Sequence[Job], program: Sequence[str], *, stop: Callable[[], int], console: Console
) -> Outcome:
    """Run those that are not finished; a failure does not keep others from running.

    Args:
        program: The words before `finetune`, `predict` and `evaluate`.
        stop: Gives the exit code to stop with, else 0.

    Raises:
        OSError: A job's folder cannot be written.
    """
    outcome = Outcome()
    with LiveLine(console, "jobs", total=len(jobs), transient=True) as line:
        for number, job in enumerate(jobs):

            def show(stage: str, job: Job = job, number: int = number) -> None:
                text = f"{job.id}: {stage}"
                plain = f"job {number + 1} of {len(jobs)}, {text}"
                line.update(number, len(jobs), text, plain, last=True)

            outcome.code = stop()
            if outcome.code:
                break
            if state(job) == FINISHED:
                outcome.counts[SKIPPED] += 1
                continue
            job.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as held:
                busy = f"{job.id}: in use by another process; left to it"
                try:
                    held.enter_context(locked(job.folder / LOCK, busy=busy))
                except UserError:
                    line.say(busy)
                    outcome.counts[IN_USE] += 1
                    continue
                ended = _run(job, program, stop, show)
            outcome.counts[ended["state"]] += 1
            if ended["state"] == FAILED:
                outcome.messages.append(f"{job.id}: {ended['message']}")
                line.say(f"failed: {job.id}: {ended['message']}")
            if ended["state"] == STOPPED:
                outcome.code = ended["exit_code"]
                break
    if not outcome.code and outcome.counts[FAILED]:
        outcome.code = SOME_FAILED
    return outcome


def _run(
    job: Job, program: Sequence[str], stop: Callable[[], int], show: Callable[[str], None]
) -> dict[str, Any]:
    """All stages that are not done. Gives the record it wrote last."""
    if state(job) == FINISHED:  # by another process, a moment ago
        return read_record(job)
    before = read_record(job) or {}
    done = [stage for stage in STAGES if stage in (before.get("done") or ())]
    if len(done) == len(STAGES):  # but the result is gone
        done = done[:-1]
    record = {
        "job": job.id,
        "definition": job.definition,
        "state": RUNNING,
        "done": done,
        "stage": "",
        "exit_code": None,
        "message": "",
        "started": time.time(),
        "seconds": dict(before.get("seconds") or {}),  # per stage
    }

    def write(**changes: Any) -> dict[str, Any]:
        record.update(changes, updated=time.time())
        write_atomically(job.folder / RECORD, json.dumps(record, indent=1).encode())
        return record

    for stage, words in commands(job).items():
        if stage in done:
            continue
        show(stage)
        write(stage=stage)
        begun = time.monotonic()
        code = _call([*program, *words], job.folder / LOG, stop)
        asked = stop()
        if asked or code in (PREEMPTED, INTERRUPTED):
            code = asked or code
            return write(state=STOPPED, exit_code=code, message=f"stopped in {stage} as asked")
        if code:
            message = f"{stage} ended with {code}: {_last_line(job.folder / LOG)}"
            return write(state=FAILED, exit_code=code, message=message)
        record["seconds"][stage] = round(time.monotonic() - begun, 1)
        done.append(stage)
        write()
    if not job.metrics.is_file():
        message = f"evaluate ended well, but {job.metrics} is missing"
        return write(state=FAILED, exit_code=1, message=message, done=done[:-1])
    return write(state=FINISHED, exit_code=0, stage="")


def _call(words: Sequence[str], log: Path, stop: Callable[[], int]) -> int:
    """Run a command with its words in the log. A stop is handed on once; its end is waited for."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(words)}\n".encode(errors="surrogateescape"))
        file.flush()
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while not _ended(child, _POLL):
                if stop():  # not as SIGINT: of Ctrl-C the child has heard by itself
                    child.terminate()
                    _ended(child, _PATIENCE)
                    break
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return child.returncode


def _ended(child: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    return child.returncode is not None


def _same(job: Job, found: dict[str, Any]) -> bool:
    return found["definition"] == job.definition


def _last_line(log: Path) -> str:
    """What a command said at its end, and where to read the rest."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("sparsemae: error: ") if lines else ""
    said = "" if said.startswith("$ ") else one_line(said)
    return f"{said}; in full: {log}" if said else f"see {log}"
