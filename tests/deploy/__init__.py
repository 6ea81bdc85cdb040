"""What deploy/ says, against the code and before the tools that read it."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
