"""Configuration: pydantic models filled from one TOML file and `key.sub=value` overrides.

Each component owns the model it reads; this file only knows how to build one, strictly: an unknown
key, a missing key or a wrong type is a `UserError` that names the key and the remedy.
"""

import difflib
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError

from sparsemae.errors import UserError


class Strict(BaseModel):
    """A section: no unknown keys, no silent conversions, no changes after it is built."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _three(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,) * 3
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_three)]
"""Voxels per axis; one number stands for all three."""

C = TypeVar("C", bound=Strict)


def load_config(kind: type[C], source: str | Path, overrides: Sequence[str] = ()) -> C:
    """Build `kind` from a recipe name or a TOML file, with overrides applied in order.

    Raises:
        UserError: No such recipe or file, bad TOML, or a key, type or range that does not fit.
    """
    raw = _read(source)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"--set {item}: expected key=value, such as train.steps=1000")
        *sections, leaf = key.strip().split(".")
        node = raw
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {item}: {name} is a value, not a section")
        node[leaf] = _value(text.strip())
    return build_config(kind, raw)


def build_config(kind: type[C], raw: dict[str, Any]) -> C:
    """Build `kind` from plain data; all complaints in one `UserError`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        complaints = dict.fromkeys(_complaint(kind, e) for e in error.errors())
        raise UserError("; ".join(complaints)) from None


def dump_config(config: Strict, path: Path) -> None:
    """Write the resolved configuration as TOML; `load_config` reads it back."""
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = files("sparsemae") / "recipes"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith("toml"))


def _read(source: str | Path) -> dict[str, Any]:
    if str(source) in recipes():
        text = (files("sparsemae") / "recipes" / f"{source}.toml").read_text()
    elif Path(source).is_file():
        text = Path(source).read_text()
    else:
        raise UserError(
            f"--config {source}: no such file, and no recipe of that name "
            f"(recipes: {', '.join(recipes())})"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source}: not valid TOML: {error}") from None


def _value(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _complaint(kind: type[Strict], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    known = _keys(kind)
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, 1, 0.6) or [
            name for name in known if name.split(".")[-1] == path[-1]
        ]
        if near:
            return f"unknown config key {key}: did you mean {near[0]}?"
        inside = ".".join(path[:-1])
        siblings = [k for k in known if k.rpartition(".")[0] == inside]
        return f"unknown config key {key}: choose from {', '.join(siblings or known)}"
    while key not in known and path:  # a union member or tuple index, not a key
        path.pop()
        key = ".".join(path)
    if error["type"] == "missing":
        return f"config key {'.'.join(str(p) for p in error['loc'])}: missing"
    return f"config key {key}: {error['msg'].lower()}, got {error['input']!r}"


def _keys(kind: type[Strict], prefix: str = "") -> list[str]:
    """All dotted keys of a section and its sub-sections."""
    out = []
    for name, info in kind.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Strict):
            out += _keys(section, f"{prefix}{name}.")
        out.append(f"{prefix}{name}")
    return out
