"""What this machine lends a process."""

import contextlib
import math
import os
from pathlib import Path, PurePosixPath

MEMBERSHIP = "/proc/self/cgroup"
CONTROL_GROUPS = "/sys/fs/cgroup"


def cores() -> int:
    """CPU cores that this process may use; in a container those that it was given, not those of the machine."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.ceil(min(ours, granted_cpus())), 1)


def granted_cpus(membership: str = MEMBERSHIP, groups: str = CONTROL_GROUPS) -> float:
    """CPUs whose time the control groups (cgroup v2) of this process let it use; infinite where nothing is said.

    Each group above has its say: a pod's limit stands in the group above that of its container.
    """
    group = PurePosixPath(_group(membership))
    return min(_quota(Path(groups, *one.parts[1:], "cpu.max")) for one in (group, *group.parents))


def _group(membership: str) -> str:
    """The control group of this process, the root where there is none of version 2."""
    with contextlib.suppress(OSError):
        for line in Path(membership).read_text().splitlines():
            if line.startswith("0::/"):
                return line.removeprefix("0::")
    return "/"


def _quota(path: Path) -> float:
    """The CPUs of a file such as ``150000 100000``: microseconds that may be used in so many that pass, or ``max``."""
    try:
        used, passed = path.read_text().split()
        return float(used) / float(passed) if used != "max" else math.inf
    except (OSError, ValueError):  # there is no such file in the root, nor where the group lies out of sight
        return math.inf
