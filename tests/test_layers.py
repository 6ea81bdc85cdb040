"""The package imports downwards only, and foreign libraries stay behind their fences."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "embedding_server"
NAME = PACKAGE.name

BOTTOM = {"core", "settings", "errors", "watch", ""}
LAYERS = {
    "observability": BOTTOM,
    "runtime": BOTTOM | {"observability"},
    "convert": BOTTOM | {"observability"},
    "catalog": BOTTOM | {"observability", "runtime", "convert"},
    "serving": BOTTOM | {"observability", "runtime", "convert", "catalog"},
    "api": BOTTOM | {"observability", "runtime", "convert", "catalog", "serving"},
    "core": {"errors"},
    "settings": {"errors"},
    "errors": set(),
    "watch": set(),
    "": set(),
}
"""What each part may import of ours beside itself; `""` is the package's own version."""
TOP = {
    "app",
    "server",
    "health",
    "doctor",
    "tune",
    "listing",
    "conversion",
    "cache",
    "table",
    "cli",
    "__main__",
}

FENCES = {
    "onnxruntime": {"runtime"},
    "onnx": {"convert", "runtime"},
    "safetensors": {"convert"},
    "tokenizers": {"runtime"},
    "fastembed": {"catalog"},
    "huggingface_hub": {"catalog"},
    "litestar": {"api", "app"},
    "prometheus_client": {"observability"},
    "opentelemetry": {"observability"},
    "pynvml": {"runtime"},
    "tiktoken": {"runtime"},
    "uvicorn": {"server"},
    "yaml": {"catalog"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    """A module imports what its layer may, and foreign libraries where they belong."""
    part, imported = _part(path), _imports(path)
    ours = {name.split(".")[1] for name in imported if name.startswith(f"{NAME}.")} - {
        "__version__"
    }
    if part not in TOP:
        assert ours <= LAYERS[part] | {part}
    elif part != "app":
        assert "app" not in ours or part == "server"
    for library, parts in FENCES.items():
        if any(name.split(".")[0] == library for name in imported):
            assert part in parts, f"{library} belongs to {parts}"


def test_dialects_do_not_import_each_other() -> None:
    """Dialects share code through modules that are none."""
    dialects = {"native", "kinds", "openai", "cohere", "tei", "unified", "fast", "ops", "docs"}
    for path in (PACKAGE / "api").rglob("*.py"):
        name = path.relative_to(PACKAGE / "api").parts[0].removesuffix(".py")
        if name in dialects:
            others = {f"{NAME}.api.{other}" for other in dialects - {name}}
            assert not any(one.startswith(tuple(others)) for one in _imports(path)), path


def test_environment_is_read_in_one_place() -> None:
    """`os.environ` appears in settings.py and cli.py alone."""
    readers = {_part(path) for path in MODULES if "os.environ" in path.read_text()}
    assert readers <= {"settings", "cli"}


def test_sizes() -> None:
    """No module over 400 lines, no function over 80."""
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"
