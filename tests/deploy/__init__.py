"""What deploy/ says, against the code and before the tools that read it."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """A command of .venv-deploy, or one that is installed."""
    found = shutil.which(name, path=f"{ROOT / '.venv-deploy' / 'bin'}:{os.environ['PATH']}")
    assert found, f"{name} is missing: `make test-all` installs it"
    return found
