"""What the host has free: of the machine, or of a container with a limit, whichever is less."""

import pytest

from graphswap import host_memory

GIB = 1 << 30
V1, V2 = "4:memory:/a/b\n0::/a/b\n", "0::/a/b\n"


def machine(root, available=8 * GIB, groups="", **files):
    """A root directory with these files, named by their paths with "__" for "/"."""
    texts = {
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available >> 10} kB\n",
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name.replace('__', '/')}": str(text) for name, text in files.items()},
    }
    for name, text in texts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v2(folder, limit, used, cache=0):
    names = ("memory.max", "memory.current", "memory.stat")
    stat = f"anon 1\ninactive_file {cache}\n"
    return {f"{folder}{name}": value for name, value in zip(names, (limit, used, stat), strict=True)}


def v1(folder, limit, used, cache=0):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    stat = f"inactive_file 7\ntotal_inactive_file {cache}\n"
    return {f"memory__{folder}{name}": value for name, value in zip(names, (limit, used, stat), strict=True)}


def test_this_machine_has_some():
    assert 0 < host_memory.free_bytes() < 1 << 60


@pytest.mark.parametrize(
    ("groups", "limits", "free"),
    [
        ("", {}, 8 * GIB),
        (V2, {}, 8 * GIB),
        (V2, v2("a__b__", 4 * GIB, GIB), 3 * GIB),
        (V2, v2("a__b__", 4 * GIB, 3 * GIB, GIB), 2 * GIB),
        (V2, v2("a__b__", 4 * GIB, 5 * GIB), 0),
        (V2, v2("a__b__", "max", GIB), 8 * GIB),
        (V2, {**v2("a__b__", "max", GIB), **v2("a__", 6 * GIB, GIB)}, 5 * GIB),
        (V2, v2("", 2 * GIB, GIB), GIB),
        (V1, v1("a__b__", 4 * GIB, 3 * GIB, GIB), 2 * GIB),
        (V1, v1("a__b__", (1 << 63) - 4096, GIB), 8 * GIB),
    ],
)
def test_the_tightest_limit_holds(tmp_path, groups, limits, free):
    assert host_memory.free_bytes(machine(tmp_path, groups=groups, **limits)) == free


def test_without_linux_the_system_is_asked(tmp_path):
    assert host_memory.free_bytes(tmp_path) > 0
