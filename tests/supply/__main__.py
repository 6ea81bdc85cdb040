"""`audit` compares all that the locks pin with OSV's known vulnerabilities; `sbom` lists it.

What pip-audit says is judged here: it ends in a traceback where its source is out of reach, which
is reported and is no failure. The bills of materials are in CycloneDX's JSON.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from embedding_server import __version__
from tests.supply import BIN, IMAGES, LOCKS, ROOT, pinned, rounds

OSV = "https://api.osv.dev/v1/query"
_OUT_OF_REACH = re.compile(r"ConnectionError|Could not connect|Timeout|\b50[234] Server Error")


def audit(url: str) -> int:
    """1 where a vulnerability is known, or the tool fails; 0 also where nobody can be asked."""
    packages = pinned(LOCKS)
    found: list[Any] = []
    for some in rounds(packages):
        said = _pip_audit(some, url)
        if not said.stdout:
            if _OUT_OF_REACH.search(said.stderr):
                print(f"not audited: {url} is out of reach")
                break  # what was found before counts
            print(said.stderr, file=sys.stderr)
            return 1
        found += json.loads(said.stdout)["dependencies"]
    if not found:
        return 0
    faults = 0
    for one in found:
        if "skip_reason" in one:
            print(f"{one['name']}: not audited: {one['skip_reason']}")
        for vuln in one.get("vulns", ()):
            faults += 1
            fixed = " or ".join(vuln["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {vuln['id']}, mended in {fixed}")
    audited = sum("vulns" in one for one in found)
    print(f"{audited} of {len(packages)} packages audited: {faults} known vulnerabilities")
    return 1 if faults else 0


def _pip_audit(packages: list[tuple[str, str]], url: str) -> "subprocess.CompletedProcess[str]":
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in packages)
        file.flush()
        flags = ["--vulnerability-service", "osv", "--osv-url", url, "--format", "json"]
        flags += ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
        return subprocess.run(
            [BIN / "pip-audit", *flags, "--requirement", file.name],
            check=False,
            capture_output=True,
            text=True,
        )


def sbom(directory: Path) -> int:
    """Write `sbom-cpu.json` and `sbom-cuda.json`: what the lock of each image pins."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, lock in IMAGES.items():
        # Without the warning that a lock does not say who needs whom.
        command: list[str | Path] = [
            BIN / "python",
            "-W",
            "ignore::UserWarning",
            "-m",
            "cyclonedx_py",
        ]
        command += ["requirements", lock, "--output-reproducible"]
        command += ["--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        bill = json.loads(made.stdout)
        bill["metadata"]["component"]["version"] = __version__  # pyproject.toml does not have it
        path = directory / f"sbom-{kind}.json"
        path.write_text(json.dumps(bill, indent=1))
        print(f"{path}: {len(bill['components'])} packages")
    return 0


def main() -> int:
    """The exit status."""
    arguments = argparse.ArgumentParser(prog="python -m tests.supply")
    verbs = arguments.add_subparsers(required=True, dest="verb")
    verbs.add_parser("audit").add_argument("--osv-url", default=OSV)
    verbs.add_parser("sbom").add_argument("--directory", type=Path, default=Path("dist"))
    given = arguments.parse_args()
    return audit(given.osv_url) if given.verb == "audit" else sbom(given.directory)


if __name__ == "__main__":
    sys.exit(main())
