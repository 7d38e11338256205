"""Every stable code under which a volume, or an entry of a list, is refused or warned about.

Records and scripts rely on the codes: one is added, never renamed. docs/bad-input.md lists them.
"""

from dataclasses import dataclass

from sparsemae.errors import UserError


class VolumeError(UserError):
    """A volume that cannot be used; `code` is short, dotted and stable, for records and scripts."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self):
        return VolumeError, (self.code, str(self))


@dataclass(frozen=True)
class Notice:
    """A warning: the volume is used, and this is what was found or changed."""

    code: str
    message: str  # one line with the file and what was done
