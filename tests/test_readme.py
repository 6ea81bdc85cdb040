"""The README is complete and true: tables against the code, commands against a real server."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from embedding_server import errors
from embedding_server.api import Face
from embedding_server.errors import ServiceError
from embedding_server.observability.metrics import Metrics
from embedding_server.settings import Declared, declared
from tests.process import server

README = (Path(__file__).parent.parent / "README.md").read_text()


def setting_rows() -> list[str]:
    """One table row per setting."""
    return [f"| `{row.env}` | {_default(row)} | {row.field.text} |" for row in declared()]


def _default(row: Declared) -> str:
    value = row.default
    if value is msgspec.NODEFAULT:
        return "required"
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{value >> 20}M`" if row.field.size and value else f"`{value}`"


def metric_rows() -> list[str]:
    """One table row per instrument of ours."""
    rows = []
    for instrument in vars(Metrics("test")).values():
        if not hasattr(instrument, "_labelnames"):
            continue
        (family,) = instrument.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = "{" + ",".join(instrument._labelnames) + "}" if instrument._labelnames else ""
        rows.append(f"| `{name}{labels}` | {family.type} | {family.documentation} |")
    return rows


def error_rows() -> list[str]:
    """One table row per error code."""
    classes = [one for one in vars(errors).values() if isinstance(one, type)]
    coded = [one for one in classes if issubclass(one, ServiceError) and hasattr(one, "code")]
    coded.sort(key=lambda one: one.status)
    return [f"| `{one.code}` | {one.status} | `{one.prefix}: ` |" for one in coded]


@pytest.mark.parametrize("rows", [setting_rows(), metric_rows(), error_rows()])
def test_tables_are_complete(rows: list[str]) -> None:
    """Every setting, metric and error code has exactly its row."""
    assert len(rows) > 5
    missing = [row for row in rows if row not in README.splitlines()]
    assert not missing, "\n".join(missing)


def test_nothing_else_is_in_the_tables() -> None:
    """A setting or metric that is gone is gone from the README."""
    named = set(re.findall(r"^\| `((?:INFERENCE|inference)_\w+)", README, re.MULTILINE))
    real = set(
        re.findall(r"`((?:INFERENCE|inference)_\w+)", "\n".join(setting_rows() + metric_rows()))
    )
    assert named == real


def test_endpoints_are_complete() -> None:
    """Every route is in the README."""
    paths = {path for one in Face.of().handlers if hasattr(one, "paths") for path in one.paths}
    assert len(paths) > 10
    assert {path for path in paths if f"`{path}`" not in README} == set()


def examples() -> Iterator[tuple[str, str]]:
    """Every command of the console blocks with the output shown below it."""
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = example.splitlines()
            end = next(i for i, line in enumerate(lines) if not line.endswith(("\\", ",")))
            yield "\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :])


def test_commands_work_as_printed() -> None:
    """The curl commands, run one after the other against a fresh server, print what is shown."""
    with server("--demo") as demo:
        demo.until("/health/ready")
        for command, shown in examples():
            here = command.replace("localhost:8090", str(demo.base_url).removeprefix("http://"))
            ran = subprocess.run(["bash", "-c", here], check=True, capture_output=True, text=True)
            compare(ran.stdout.strip(), shown)


def compare(printed: str, shown: str) -> None:
    """Floats may differ in their last digits on other processors; `...` stands for anything."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    parts = [re.escape(part) for part in re.split(number, shown)]
    pattern = f"({number})".join(parts).replace(r"\.\.\.", r"[\s\S]*")
    match = re.fullmatch(pattern, printed)
    assert match, f"{shown}\n\n{printed[:2000]}"
    expected = [float(value) for value in re.findall(number, shown)]
    assert [float(value) for value in match.groups()] == pytest.approx(expected, abs=1e-4)


def test_there_are_commands() -> None:
    """The examples cover embedding, batches, reranking, lists, health and metrics."""
    commands = "\n".join(command for command, _ in examples())
    for path in ("embed ", "embed/batch", "rerank ", "embedders", "rerankers", "health", "metrics"):
        assert f"/{path}" in commands.replace("\n", " \n") + " "
