"""Which configuration counts when a run is started or goes on."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from sparsemae.config import load_config
from sparsemae.errors import UserError
from sparsemae.kinds import kind_of
from sparsemae.runfiles import CONFIG
from sparsemae.training.folder import check_free, config_file
from sparsemae.training.keeper import changed_keys
from sparsemae.training.options import RESUMABLE


class RunConfig(Protocol):
    """The configuration of a run of any kind."""

    command: ClassVar[str]  # of sparsemae, that makes such runs

    def going_on(self, before: Any) -> "RunConfig":
        """This, given again to resume a run of `before`; what it leaves open is the run's."""

    def resolved(self) -> "RunConfig":
        """With what follows from other keys written out."""

    def defining(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, as plain data."""


C = TypeVar("C", bound=RunConfig)


def settle(
    kind: type[C], run: Path, config: C | None, overrides: Sequence[str], *, resume: bool
) -> C:
    """The configuration that counts; the folder is looked at, not changed.

    Args:
        config: That of a new run; when resuming that of the run, or None.
        overrides: `key=value` for what is read from the run folder.

    Raises:
        UserError: The folder is not free, or the configuration is not that of the run in it.
    """
    check_free(run, resume=resume)
    if not (resume and (run / CONFIG).exists()):
        if config is None:
            config_file(run)
        return config.resolved()
    if config is None:
        return read_config(kind, run, overrides)
    before = read_config(kind, run)
    config = config.going_on(before)
    if changed := changed_keys(before.defining(), config.defining()):
        raise UserError(
            f"--config: {', '.join(changed)} differ from those of the run in {run}, which keeps "
            f"them: drop --config and --set to resume it, or start a new run in another folder"
        )
    return config.resolved()


def read_config(kind: type[C], run: Path, overrides: Sequence[str] = ()) -> C:
    """The configuration of a run, with `overrides` of what a resumed run may change.

    Raises:
        UserError: There is no run, it is of another kind, or keeps what is overridden.
    """
    path = config_file(run)
    if (made := kind_of(run).command) != kind.command:
        raise UserError(
            f"{run} holds a run of `sparsemae {made}`, not of `sparsemae {kind.command}`: name "
            f"another folder"
        )
    return load_config(kind, path, resumable(overrides))


def resumable(overrides: Sequence[str]) -> Sequence[str]:
    """`overrides` if they are of keys that a resumed run may change, else UserError."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key not in RESUMABLE:
            near = difflib.get_close_matches(key, RESUMABLE, 1, cutoff=0.85)  # train.lr is no typo
            hint = f"did you mean {near[0]}?" if near else f"it may change {', '.join(RESUMABLE)}."
            raise UserError(
                f"--set {item}: a resumed run keeps its {key}; {hint} Start a new run for anything "
                f"else"
            )
    return overrides
