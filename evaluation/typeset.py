"""Text as a table: for the terminal, for Markdown. tabulate sets it; with wcwidth it knows how wide any script is.

Apart from tables.py, so that feature_extraction.py can print one without the metrics, which take a second to import.
"""

from tabulate import TableFormat, tabulate


def as_text(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table for the terminal. The first `left` columns are text, the others numbers."""
    return set_table(heads, rows, left, "plain")


def as_markdown(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """The same for a Markdown file."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return set_table(heads, escaped, left, "pipe")


def set_table(heads: list[str], rows: list[list[str]], left: int, style: str | TableFormat) -> str:
    sides = ["left" if column < left else "right" for column in range(len(heads))]
    # Numbers come as text with the digits that they are to have
    table = tabulate(rows, heads, style, disable_numparse=True, colalign=sides if rows else None)
    return "\n".join(line.rstrip() for line in table.splitlines())
