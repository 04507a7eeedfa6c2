"""How much more of the host's memory this process may take, as Linux tells it.

The machine's free memory, or what a control group (a container's limit) leaves of its own, whichever is less. What
can be dropped without loss, as pages of files, counts as free.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_V1_NO_LIMIT = 1 << 62
"""Version 1 of control groups says "no limit" as the largest number of whole pages."""


def free_bytes(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that this process may still take.

    Args:
        root: Where `proc` and `sys` are.
    """
    return max(0, min(_machine_bytes(root), *_group_bytes(root), _V1_NO_LIMIT))


def _machine_bytes(root: pathlib.Path) -> int:
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _group_bytes(root: pathlib.Path) -> Iterator[int]:
    """What each control group around this process leaves of its limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cache = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = pathlib.PurePosixPath(path).relative_to("/").parts
        for depth in range(
            len(parts) + 1
        ):  # a group's limit holds for those inside; in a container the path may lead nowhere
            folder = top.joinpath(*parts[:depth])
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + _counted(folder / "memory.stat", cache)


def _counted(file: pathlib.Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
