"""Threads follow the container's CPU quota and the process's affinity."""

import os
from pathlib import Path

import pytest

from embedding_server.runtime.cores import sums_bytes_exactly, usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, ALL),
        ({"cpu.max": "max 100000"}, ALL),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, min(2, ALL)),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"system.slice/unit/cpu.max": "50000 100000"}, 1),
        ({"system.slice/cpu.max": "50000 100000", "system.slice/unit/cpu.max": "max 100000"}, 1),
        ({"user.slice/cpu.max": "50000 100000"}, ALL),
        (
            {
                "cpu/system.slice/unit/cpu.cfs_quota_us": "50000",
                "cpu/system.slice/unit/cpu.cfs_period_us": "100000",
            },
            1,
        ),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    """The least quota of a group this process is in caps the cores, rounded up, never below one."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{text}\n")
    own = tmp_path / "own"
    own.write_text("4:cpu,cpuacct:/system.slice/unit\n0::/system.slice/unit\n")
    assert usable_cores(tmp_path, own) == cores


def test_affinity() -> None:
    """A process bound to one core uses one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores(Path("/nowhere")) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ("fpu sse2 avx2", False),
        ("fpu sse2 avx2 avx512_vnni", True),
        ("fpu sse2 avx_vnni", True),
        ("fp asimd asimddp", True),
    ],
)
def test_sums_of_bytes(tmp_path: Path, flags: str, exact: bool) -> None:  # noqa: FBT001 - a case
    """Of x86 processors only those with VNNI add up products of bytes exactly."""
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    assert sums_bytes_exactly(tmp_path / "cpuinfo") == exact
