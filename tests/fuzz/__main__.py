"""Lets schemathesis fuzz a real server by its own OpenAPI document, with all of its checks.

What is configured away, and why, is in `schemathesis.toml` and `hooks.py`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.api.test_own_kinds import write_all
from tests.process import server
from tests.tiny import write_cross_encoder, write_model

HERE = Path(__file__).parent
SCHEMATHESIS = HERE.parents[1] / ".venv-fuzz" / "bin" / "schemathesis"
_SEED = 20_000
_SECONDS_PER_EXAMPLE = 6.0
"""Of all operations together, at most; it takes 0.7 on two cores."""
SERVED = {
    "allowed_embedding_models": "dense,static,sparse,late,image",
    "allowed_rerank_models": "cross,late",
    "default_model": "dense,cross",
}
"""Settings: models of every kind, and those of requests that name none."""


def write_models(root: Path) -> None:
    """One small model of every kind."""
    write_all(root)
    write_model(root / "dense")
    write_cross_encoder(root / "cross")


def main() -> int:
    """Schemathesis's exit status."""
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz")
    arguments.add_argument("--examples", type=int, default=100, help="per operation")
    examples = arguments.parse_args().examples
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SERVED.items()]
        flags += [f"--model-path={directory}", "--warmup-ms=0", "--log-level=error"]
        with server(*flags) as client:
            client.until("/health/ready")
            return subprocess.run(
                [
                    SCHEMATHESIS,
                    "run",
                    f"{client.base_url}/api/openapi.json",
                    f"--max-examples={examples}",
                    f"--seed={_SEED}",
                    "--continue-on-failure",
                    "--generation-database=none",
                ],
                cwd=HERE,  # where its configuration is
                timeout=_SECONDS_PER_EXAMPLE * examples,
                check=False,
            ).returncode


if __name__ == "__main__":
    sys.exit(main())
