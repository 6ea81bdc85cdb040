"""An image's own command, run as a container engine would, by util-linux alone.

It is process 1 of its process namespace, its root directory is read-only, and it may write to the
volume /cache and to /tmp only. The network is the host's.
"""

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.server import free_port
from tests.image.store import call, end
from tests.process import Server

OWN = "/mnt"
"""Where own models are mounted."""
_MOUNT_AND_RUN = f"""
root=$1 cache=$2 own=$3 uid=$4 gid=$5; shift 5
mount -o bind,ro "$root" "$root"
mount -o bind,ro /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -o bind "$cache" "$root/cache"
mount -o bind,ro "$own" "$root{OWN}"
exec setpriv --no-new-privs \\
    unshare --root="$root" --wd=/cache --setgid="$gid" --setuid="$uid" -- "$@"
"""


class Running(Server):
    """A container's server and a client of it; `pid` is what the host calls its process 1."""

    pid: int
    enter: list[str]
    env: dict[str, str]

    def inside(self, *command: str, seconds: float) -> str:
        """What another command in the container prints; its status is 0."""
        return call(*self.enter, "--", *command, seconds=seconds, env=self.env)

    def status(self, name: str) -> list[str]:
        """One line of what the kernel says of process 1."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return line.split()[1:]

    def writable(self) -> set[str]:
        """Mounts that process 1 may write to, as far as files' modes let it."""
        lines = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return {line.split()[4] for line in lines if "rw" in line.split()[5].split(",")}


@contextmanager
def running(
    config: dict[str, Any], root: Path, own: Path, scratch: Path, **env: str
) -> Iterator[Running]:
    """The image's entry point with its command and variables; all it started ends with it."""
    port, log = free_port(), scratch / "log"
    client = Running(base_url=f"http://127.0.0.1:{port}", timeout=10)
    client.env = dict(one.split("=", 1) for one in config["Env"])
    client.env |= {"INFERENCE_PORT": str(port), "INFERENCE_DRAIN_GRACE_MS": "100", **env}
    uid, gid = config["User"].split(":")
    spaces = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    places = [str(root), str(_volume(scratch / "cache", root / "cache")), str(own)]
    script = ["sh", "-euc", _MOUNT_AND_RUN, "sh", *places, uid, gid]
    with log.open("w") as written:
        process = subprocess.Popen(
            ["unshare", *spaces, *script, *config["Entrypoint"], *config["Cmd"]],
            env=client.env,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    with process, client:
        try:
            client.process = process
            client.until("/health/ready", seconds=60)
            client.pid = int(call("pgrep", "--parent", str(process.pid)))
            client.enter = ["nsenter", f"--target={client.pid}", "--mount", "--pid", "--root"]
            client.enter += ["--wd", f"--setgid={gid}", f"--setuid={uid}"]
            yield client
        except BaseException as exc:
            exc.add_note(log.read_text()[-3000:])
            raise
        finally:
            end(process)


def _volume(cache: Path, of_image: Path) -> Path:
    """A new volume; engines give it the owner and the mode of the image's own directory."""
    cache.mkdir()
    found = of_image.stat()
    os.chown(cache, found.st_uid, found.st_gid)
    cache.chmod(stat.S_IMODE(found.st_mode))
    return cache
