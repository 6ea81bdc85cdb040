"""The README's quick starts, run as they are printed."""

import re

import pytest

from conftest import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
CLIENTS = {
    "openai", "cohere", "huggingface_hub", "langchain_openai", "langchain_huggingface",
    "llama_index", "haystack",
}  # fmt: skip


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split()[1])
def test_quick_start(demo: str, capsys: pytest.CaptureFixture[str], code: str) -> None:
    """It prints what stands behind its `print`."""
    assert "localhost:8090" in code
    exec(code.replace("http://localhost:8090", demo), {})  # noqa: S102 - our own README
    shown = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert shown
    assert capsys.readouterr().out.splitlines() == shown


def test_every_client_has_one() -> None:
    """No client of these tests is missing in the README."""
    imported = {
        name for code in BLOCKS for name in re.findall(r"^(?:from|import) (\w+)", code, re.M)
    }
    assert imported >= CLIENTS
