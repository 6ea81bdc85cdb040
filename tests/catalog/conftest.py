"""What tests of model configurations share."""

from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The file, which nobody has written yet."""
    return tmp_path / "models.yaml"
