"""Tables that verbs of the command line print."""

from collections.abc import Sequence


def show(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of equally many cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
