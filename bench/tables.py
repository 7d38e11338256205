"""Tables for a terminal and for a document, from the same rows of text."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sparsemae.errors import UserError

Rows = Sequence[Sequence[str]]


def rich_table(title: str, header: Sequence[str], rows: Rows, left: int = 1) -> Table:
    """The first `left` columns are words, the others numbers."""
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Rows, left: int = 1) -> str:
    """A table in Markdown, with a newline at its end."""
    rules = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_markdown(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- /name -->` of a document.

    A document that does not exist is made of these lines.

    Raises:
        UserError: It exists without them: nobody's prose is overwritten.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    old = path.read_text() if path.exists() else start + end + "\n"
    before, found, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path} has no lines {start.strip()} and {end}: add them, empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + start + text + end + after)
