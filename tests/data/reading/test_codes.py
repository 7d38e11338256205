"""The codes in the table, in the documentation and in the sources are the same."""

import ast
import re
from pathlib import Path

import pytest

from sparsemae.data.codes import CODES, Findings, Notice, VolumeError, one_line

ROOT = Path(__file__).resolve().parents[3]
AREAS = {code.partition(".")[0] for code in CODES}
SPELLING = re.compile(rf"(?:{'|'.join(AREAS)})\.[a-z_]+")
FILES = re.compile(r".*\.(?:jsonl?|html|toml|txt|nii)")


def strings_of(path):
    tree = ast.parse(path.read_text())
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str}


def test_the_documentation_lists_exactly_the_codes():
    text = (ROOT / "docs" / "bad-input.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| (.+) \| (.+) \| (rejected|used) \|$", text, re.MULTILINE)
    words = {"reject": "rejected", "warn": "used"}
    assert rows == [(k, c.summary, c.remedy, words[c.level]) for k, c in CODES.items()]


def test_the_sources_use_exactly_the_codes():
    used = set()
    for path in (ROOT / "sparsemae").rglob("*.py"):
        if path.name != "codes.py":
            used |= {s for s in strings_of(path) if SPELLING.fullmatch(s) and not FILES.match(s)}
    assert used == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_code_is_spelled_and_explained(code):
    assert re.fullmatch(r"[a-z]+\.[a-z_]+", code)
    assert CODES[code].level in ("reject", "warn")
    for text in (CODES[code].summary, CODES[code].remedy):
        assert text
        assert "|" not in text
        assert text.isprintable()


def test_messages_are_one_printable_line():
    odd = "a\nb\r\x1b[31m\u2028\u202e\udcff\x85\u00a0ä 'x'"
    line = one_line(odd)
    assert line == "a\\nb\\r\\x1b[31m\\u2028\\u202e\\udcff\\x85\\xa0ä 'x'"
    findings = Findings(Path(odd))
    findings.warn("geometry.none", "text")
    assert findings.notices == [Notice("geometry.none", f"{line}: text")]
    assert str(findings.refuse("container.empty", "text")) == f"{line}: text"
    assert str(VolumeError("container.empty", "two\nlines")) == "two\\nlines"
