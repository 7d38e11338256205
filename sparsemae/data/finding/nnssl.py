"""nnssl's `pretrain_data.json`: data sets -> subjects -> sessions -> images with their masks.

Its anonymisation mask is our `excluded`, its anatomy mask our `anatomy`. A path that starts with
$NAME, as in $nnssl_raw/..., takes the environment variable's value in its place.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsemae.data.finding.entry import Entry, mistake
from sparsemae.data.finding.scan import split_suffix
from sparsemae.data.finding.written import Row, json_kind, listed, read_json

NAME = "pretrain_data.json"


@dataclass(frozen=True, slots=True)
class _Node:
    """A JSON value and where it stands, for messages."""

    source: str
    place: str
    value: Any

    def get(self, key: str, kind: type, required: bool = True) -> "_Node | None":
        """The value of `key`; null is as good as nothing."""
        inner = _Node(self.source, f"{self.place}.{key}".lstrip("."), self.value.get(key))
        if inner.value is None and not required:
            return None
        return inner.checked(kind)

    def items(self) -> Iterator[tuple[str, "_Node"]]:
        for key, value in self.value.items():
            yield key, _Node(self.source, f"{self.place}.{key}", value).checked(dict)

    def __iter__(self) -> Iterator["_Node"]:
        for number, value in enumerate(self.value):
            yield _Node(self.source, f"{self.place}[{number}]", value).checked(dict)

    def checked(self, kind: type) -> "_Node":
        if not isinstance(self.value, kind):
            wanted = {dict: "an object", list: "a list", str: "text"}[kind]
            found = "missing" if self.value is None else json_kind(self.value)
            raise self.wrong(f"{found}, where nnssl has {wanted}; export the file again")
        return self

    def wrong(self, text: str) -> Exception:
        return mistake(self.source, f"{self.place}: {text}")


def nnssl(source: str) -> Iterator[Entry]:
    """The images that a file in this format lists."""
    rows = list(_rows(_Node(source, "", read_json(source))))
    if not rows:
        raise mistake(source, "lists no image; check how it was made")
    return listed(source, rows)


def _rows(top: _Node) -> Iterator[Row]:
    for index, dataset in top.get("datasets", dict).items():
        name = dataset.get("name", str, required=False)
        for subject, inner in dataset.get("subjects", dict).items():
            for session, last in inner.get("sessions", dict).items():
                for image in last.get("images", list):
                    row = _row(image)
                    row.subject, row.session = subject, session
                    row.dataset = index if name is None else name.value
                    row.parts = (index, subject, session, *row.parts)
                    yield row


def _row(image: _Node) -> Row:
    path = _path(image.get("image_path", str))
    name = image.get("name", str, required=False)
    modality = image.get("modality", str, required=False)
    masks = image.get("associated_masks", dict, required=False)
    return Row(
        path=path,
        modality=None if modality is None else modality.value,
        excluded=_path(masks and masks.get("anonymization_mask", str, required=False)),
        anatomy=_path(masks and masks.get("anatomy_mask", str, required=False)),
        parts=(split_suffix(os.path.basename(path) if name is None else name.value)[0],),
    )


def _path(node: _Node | None) -> str | None:
    """With a leading variable expanded."""
    if node is None or not node.value.startswith("$"):
        return None if node is None else node.value
    first, slash, rest = node.value.partition("/")
    value = os.environ.get(first[1:])
    if not value:
        raise node.wrong(f"{first} is not set; export {first[1:]}=FOLDER")
    return f"{value}{slash}{rest}"
