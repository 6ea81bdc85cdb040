"""What is installed: the locks, what may not be in the package, and who is told of it."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LOCKS = [*sorted(ROOT.glob("*.lock")), *sorted(ROOT.glob("tests/*/*.lock"))]
IMAGES = {kind: ROOT / f"requirements-{kind}.lock" for kind in ("cpu", "cuda")}
"""What is installed in an image."""
BIN = ROOT / ".venv-supply" / "bin"

_PINNED = re.compile(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", re.MULTILINE)


def pinned(locks: Sequence[Path]) -> list[tuple[str, str]]:
    """Names and versions in locks, whatever platform and Python they are for, once each."""
    return sorted({one for lock in locks for one in _PINNED.findall(lock.read_text())})


def rounds(packages: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The same in lists of which none has a name twice."""
    versions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, version in packages:
        versions[name].append((name, version))
    return [[one for one in column if one] for column in zip_longest(*versions.values())]
