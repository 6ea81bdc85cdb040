"""The CPU: how many cores this process may use, by affinity and quota, and what they can do."""

import math
import os
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Cores by affinity, or the CPU quota of cgroup v2 or v1 rounded up where that is less.

    Args:
        cgroups: where they are mounted.
        own: lists those of this process; every group above them counts too.
    """
    return math.ceil(min(float(len(os.sched_getaffinity(0))), quota(cgroups, own)))


def quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Cores that the quota allows, arguments as above; infinite where there is none."""
    quotas = [math.inf]
    for line in (":/", *_words(own)):
        below = Path(line.rpartition(":")[2].lstrip("/"))
        for group in (below, *below.parents):
            quotas.append(_quota_v2(cgroups / group))
            quotas.append(_quota_v1(cgroups / "cpu" / group))
    return min(quotas)


def sums_bytes_exactly(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether products of 8-bit numbers are added up without overflow.

    x86 does so with VNNI only; without it, weights of 7 bits keep ONNX Runtime's sums in range.
    """
    words = _words(cpuinfo)
    return "sse2" not in words or not {"avx512_vnni", "avx_vnni"}.isdisjoint(words)


def _quota_v2(group: Path) -> float:
    """`cpu.max` holds quota and period in microseconds, or `max`."""
    words = _words(group / "cpu.max")
    return int(words[0]) / int(words[1]) if words and words[0] != "max" else math.inf


def _quota_v1(group: Path) -> float:
    """`cpu.cfs_quota_us` is -1 where there is no limit."""
    quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else math.inf


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
