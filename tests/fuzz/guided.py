"""Lets atheris look for bytes that a decoder stumbles over, led by the lines that they reach.

`python -m tests.fuzz.guided --seconds 60` goes through all of them, each in a process of its own,
for libFuzzer ends that; what is found is left in `.fuzz/`, and begins the next run.
"""

import argparse
import re
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CORPUS = ROOT / ".fuzz"
_ATHERIS = ROOT.joinpath(
    ".venv-fuzz", "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"
)
_STATS = re.compile(r"#(\d+)\s+(?:DONE|pulse|NEW|REDUCE|RELOAD)\s+cov: (\d+)")
_INSTRUMENTED = ["embedding_server", "yaml", "uvicorn", "safetensors", "zipfile", "ipaddress"]


def _atheris() -> Any:
    """The module, which is installed beside schemathesis; everything else is our own."""
    site.addsitedir(str(_ATHERIS))
    import atheris  # noqa: PLC0415 - from there

    return atheris


def fuzz(name: str, arguments: list[str]) -> None:
    """Let libFuzzer call one decoder; never returns."""
    atheris = _atheris()
    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzz.decoders import DECODERS  # noqa: PLC0415 - instrumented
    decoder = DECODERS[name]
    for at, seed in enumerate(decoder.seeds):
        CORPUS.joinpath(name, f"seed-{at}").write_bytes(seed)
    atheris.Setup([name, *arguments], decoder)
    atheris.Fuzz()


def main() -> int:
    """1 where a decoder did not just refuse."""
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz.guided")
    arguments.add_argument("--seconds", type=int, default=30, help="for each decoder")
    arguments.add_argument("--decoder", help="this one alone, in this process")
    given = arguments.parse_args()
    if not (_ATHERIS / "atheris").exists():
        print("not fuzzed: atheris has no wheel for this Python")
        return 0
    if given.decoder:
        flags = [f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=2048"]
        flags += [f"-artifact_prefix={CORPUS}/{given.decoder}-", "-print_final_stats=1"]
        fuzz(given.decoder, [*flags, str(CORPUS / given.decoder)])
    from tests.fuzz.decoders import DECODERS  # noqa: PLC0415 - not instrumented

    failed = 0
    for name in DECODERS:
        CORPUS.joinpath(name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.guided", "--decoder", name]
        said = subprocess.run(
            [*command, f"--seconds={given.seconds}"],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        runs, edges = [("0", "0"), *_STATS.findall(said.stdout)][-1]
        print(f"{name}: {runs} runs, {edges} edges, status {said.returncode}", flush=True)
        if said.returncode:
            failed += 1
            print(said.stdout[-4000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
