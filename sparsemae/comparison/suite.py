"""A suite: which methods are compared on which data sets, from one TOML file.

Everything in it is checked before anything runs, and all that is wrong is said at once.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt

from sparsemae.config import Strict, as_tuple, build_config, load_config, recipes
from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.finetuning.config import NONE, FinetuneConfig, usual_recipe
from sparsemae.segmentation.dataset import LABELS, TEST, read_dataset

ROLES = ("development", "test")  # never pooled
TEST_LABELS = "labelsTs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # it becomes a folder
_S = TypeVar("_S", bound=Strict)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("use letters, digits and . _ + -, at most 64, as it names a folder")
    return text


def _different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("one of them twice")
    return values


def _overrides(items: tuple[str, ...]) -> tuple[str, ...]:
    for item in items:
        key, equals, _ = item.partition("=")
        if not equals or not key.strip():
            raise ValueError("write key=value, as for --set")
        if key.strip() in ("seed", "fold", "init"):
            raise ValueError(f"{key.strip()} has a key of its own in the suite")
    return items


Name = Annotated[str, AfterValidator(_name)]
Numbers = Annotated[
    tuple[NonNegativeInt, ...],
    BeforeValidator(as_tuple),
    AfterValidator(_different),
    Field(min_length=1),
]


class SuiteOptions(Strict):
    """The table [suite]."""

    name: Name
    folds: Numbers = (0,)
    seeds: Numbers = (0, 1, 2)


class DatasetEntry(Strict):
    """A table of [[datasets]]; paths are relative to the suite file."""

    name: Name
    path: str  # nnU-Net's raw layout
    role: Literal["development", "test"]
    evaluate_on: Literal["fold", "test"] = "fold"  # validation cases of the fold, or imagesTs
    labels: str | None = None  # folder of reference label maps; labelsTr or labelsTs if not given
    folds: Numbers | None = None  # instead of the suite's
    source: str | None = None  # where the data come from, for readers


class MethodEntry(Strict):
    """A table of [[methods]]; the first is the one that others are compared with."""

    name: Name
    init: str  # "none", or what `finetune --init` takes
    config: str | None = None  # a recipe, or a file
    set: Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_overrides)] = ()


@dataclass(frozen=True)
class Suite:
    """A suite file that has been checked."""

    file: Path
    options: SuiteOptions
    datasets: tuple[DatasetEntry, ...]
    methods: tuple[MethodEntry, ...]

    def resolve(self, path: str) -> Path:
        """A path of the file, absolute."""
        return (self.file.resolve().parent / Path(path).expanduser()).absolute()

    def labels(self, dataset: DatasetEntry) -> Path:
        """The folder of a data set's reference label maps."""
        if dataset.labels is not None:
            return self.resolve(dataset.labels)
        own = LABELS if dataset.evaluate_on == "fold" else TEST_LABELS
        return self.resolve(dataset.path) / own

    def config(self, method: MethodEntry) -> str | None:
        """What to give to `--config`: the name of a recipe, or an absolute path."""
        if method.config is None or is_recipe(method.config):
            return method.config
        return str(self.resolve(method.config))


def is_recipe(config: str) -> bool:
    """Whether it names a recipe of fine-tuning; else it is a file."""
    return config in recipes(FinetuneConfig.recipes)


def read_suite(file: Path) -> Suite:
    """Read a suite and look for all that it names.

    Raises:
        UserError: The file, a table or a key is wrong, or data sets, weights or configurations are
            missing: all of them in one message.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(one_line(f"{file}: {error.strerror}; name a suite file")) from None
    except ValueError as error:  # of TOML or UTF-8
        raise UserError(one_line(f"{file}: not valid TOML: {error}")) from None
    known = ("suite", "datasets", "methods")
    if unknown := sorted(set(raw) - set(known)):
        raise UserError(f"{file}: unknown table {unknown[0]}; there are {', '.join(known)}")
    options = _table(SuiteOptions, file, "[suite]", raw.get("suite"))
    datasets = _tables(DatasetEntry, file, "datasets", raw.get("datasets"))
    methods = _tables(MethodEntry, file, "methods", raw.get("methods"))
    if len(methods) < 2:
        raise UserError(f"{file}: one method alone; add a second [[methods]] to compare it with")
    suite = Suite(file, options, datasets, methods)
    if missing := _missing(suite):
        raise UserError(f"{file}: {'; '.join(missing)}")
    return suite


def _tables(kind: type[_S], file: Path, key: str, value: Any) -> tuple[_S, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{file}: no {key}; add a table [[{key}]] for each")
    rows = []
    for number, raw in enumerate(value, 1):
        name = f" ({raw['name']})" if isinstance(raw, dict) and "name" in raw else ""
        rows.append(_table(kind, file, f"[[{key}]] {number}{name}", raw))
    seen = set()
    for row in rows:
        if row.name.casefold() in seen:  # some file systems take a and A for one folder
            raise UserError(f"{file}: two {key} are named {row.name}; rename one")
        seen.add(row.name.casefold())
    return tuple(rows)


def _table(kind: type[_S], file: Path, place: str, raw: Any) -> _S:
    if not isinstance(raw, dict):
        raise UserError(f"{file}: no table {place}; add one")
    try:
        return build_config(kind, raw)
    except UserError as error:
        raise UserError(one_line(f"{file}: {place}: {error}")) from None


def _missing(suite: Suite) -> list[str]:
    out = []
    for dataset in suite.datasets:
        path = suite.resolve(dataset.path)
        try:
            read_dataset(path)
        except UserError as error:
            where = f" (from {dataset.source})" if dataset.source else ""
            out.append(one_line(f"data set {dataset.name}: {error}{where}"))
            continue
        on_test = dataset.evaluate_on == "test"
        for folder in [path / TEST] * on_test + [suite.labels(dataset)]:
            if not folder.is_dir():
                remedy = 'add it, or evaluate_on = "fold"' if on_test else "name it by `labels`"
                out.append(one_line(f"data set {dataset.name}: {folder} is missing; {remedy}"))
    for method in suite.methods:
        init = suite.resolve(method.init)
        if method.init != NONE and not init.exists():
            out.append(one_line(f"method {method.name}: init: {init} is missing"))
        config = suite.config(method)
        if config is not None and not is_recipe(config) and not Path(config).is_file():
            names = ", ".join(recipes(FinetuneConfig.recipes))
            out.append(
                one_line(f"method {method.name}: config: no file {config}, nor a recipe ({names})")
            )
            continue
        try:
            load_config(FinetuneConfig, config or usual_recipe(method.init), method.set)
        except UserError as error:
            out.append(one_line(f"method {method.name}: {error}"))
    return out
