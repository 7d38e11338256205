"""Configuration: pydantic models filled from one TOML file and `key.sub=value` overrides.

Each component owns the model it reads; this file only knows how to build one, strictly: an unknown
key, a missing key or a wrong type is a `UserError` that names the key and the remedy.
"""

import difflib
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError

from sparsemae.errors import UserError
from sparsemae.files import write_atomically


class Strict(BaseModel):
    """A section: no unknown keys, no silent conversions, no changes after it is built."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    recipes: ClassVar[str] = ""  # where in recipes/ those of this kind lie


def _three(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,) * 3
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError("give one whole number of voxels, or a list of three")
    return tuple(value)


def as_tuple(value: Any) -> Any:
    """A list, as JSON and TOML have them, as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def floats(value: Any) -> Any:
    """Numbers in a list, as JSON and TOML have them, as a tuple; anything else as it is."""
    numbers = isinstance(value, list | tuple) and all(map(is_number, value))
    return tuple(map(float, value)) if numbers else value


def is_number(value: Any) -> bool:
    """Also a whole one, but neither True nor text that looks like one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


Size = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_three)]
"""Voxels per axis; one number stands for all three."""

C = TypeVar("C", bound=Strict)


def load_config(kind: type[C], source: str | Path, overrides: Sequence[str] = ()) -> C:
    """Build `kind` from a recipe name or a TOML file, with overrides applied in order.

    Raises:
        UserError: No such recipe or file, bad TOML, or a key, type or range that does not fit.
    """
    raw = _read(source, kind.recipes)
    apply_overrides(raw, overrides)
    return build_config(kind, raw)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` items in plain data, in order; values are TOML or bare words."""
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


def build_config(kind: type[C], raw: dict[str, Any]) -> C:
    """Build `kind` from plain data; all complaints in one `UserError`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_complaints(kind, error.errors()))) from None


def dump_config(config: Strict, path: Path) -> None:
    """Write the resolved configuration as TOML, whole or not at all; `load_config` reads it."""
    text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
    write_atomically(path, text.encode())


def recipes(kind: str = "") -> list[str]:
    """Names of the recipes of a kind that ship with the package; of pre-training if not said."""
    names = (path.name for path in _recipes(kind).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _recipes(kind: str) -> Traversable:
    folder = files("sparsemae") / "recipes"
    return folder / kind if kind else folder


def _read(source: str | Path, kind: str) -> dict[str, Any]:
    if str(source) in recipes(kind):
        data = (_recipes(kind) / f"{source}.toml").read_bytes()
    elif Path(source).is_file():
        data = Path(source).read_bytes()
    else:
        raise UserError(
            f"--config {source}: no such file, and no recipe of that name "
            f"(recipes: {', '.join(recipes(kind))})"
        )
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:  # of TOML or UTF-8
        raise UserError(f"--config {source}: not valid TOML: {error}") from None


def _value(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _complaints(kind: type[Strict], errors: Sequence[dict[str, Any]]) -> list[str]:
    """One per key and wrong value: a union of types complains once per member."""
    sections, leaves = _keys(kind)
    out: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        path = [str(part) for part in error["loc"]]
        place, value = f"config key {'.'.join(path)}", ""
        match error["type"]:
            case "extra_forbidden":
                place, message = f"unknown {place}", _remedy(path, error["input"], sections, leaves)
            case "missing":
                message = "missing, and it has no default"
            case _:
                while ".".join(path) not in {*sections, *leaves} and path:
                    path.pop()  # a union member or tuple index, not a key
                place, value = f"config key {'.'.join(path)}", f", got {error['input']!r}"
                message = error["msg"].removeprefix("Value error, ").replace("Input s", "s")
                if error["type"] == "model_type":
                    message = "a section of keys, not a value"
        messages = out.setdefault((place, value), [])
        if message not in messages:
            messages.append(message)
    return [f"{place}: {' or '.join(found)}{value}" for (place, value), found in out.items()]


def _remedy(path: list[str], value: Any, sections: list[str], leaves: list[str]) -> str:
    """What an unknown key was probably meant to be."""
    known = sections if isinstance(value, dict) else leaves
    names = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == ".".join(path[:-1])}
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]  # right key, wrong section
    typo = [names[n] for n in difflib.get_close_matches(path[-1], names, 1)]
    flat = difflib.get_close_matches(path[0], known, 1) if len(path) == 1 else []  # mask_ratio
    if near := elsewhere or typo or flat:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(names.values() or known)}"


def _keys(kind: type[Strict], prefix: str = "") -> tuple[list[str], list[str]]:
    """The dotted names of all sections below a section, and of all its values."""
    sections, leaves = [], []
    for name, info in kind.model_fields.items():
        options = get_args(info.annotation) or (info.annotation,)  # a section may be optional
        section = next((o for o in options if isinstance(o, type) and issubclass(o, Strict)), None)
        if section is not None:
            below = _keys(section, f"{prefix}{name}.")
            sections += [f"{prefix}{name}", *below[0]]
            leaves += below[1]
        else:
            leaves.append(f"{prefix}{name}")
    return sections, leaves
