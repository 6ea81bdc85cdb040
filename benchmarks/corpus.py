"""Natural text with a long tail: the docstrings of the standard library.

The same on every machine with the same Python.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SEED = 7
_MIN_WORDS = 3
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}


def corpus(count: int = 1984) -> list[str]:
    """`count` different texts in random but fixed order."""
    texts = list(dict.fromkeys(_docstrings()))
    random.Random(_SEED).shuffle(texts)
    return texts[:count]


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= _MIN_WORDS:
                    yield text
