"""A directory of state is claimed by one process, replaced in one move, and refused unless it is understood."""

import json
import os
import re
import subprocess
import sys

import pytest

from graphswap import state_directory
from graphswap.state_directory import Entry, Manifest, StateDirectory, StateError

FILE, SMALL = "3-1700000000000000", "4-1700000000000000"
MANIFEST = Manifest(
    7, {"w": Entry("float32", (2, 3), FILE), "b": Entry("int64", (), SMALL, 1)}, {FILE: 42, SMALL: 9}, "0.1.0"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state"


def other_process(code, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment)


COMMIT = """
import pathlib, sys
from graphswap.state_directory import Manifest, StateDirectory
directory = StateDirectory(pathlib.Path(sys.argv[1]))
directory.commit(Manifest(7, {}, {}, "0.1.0"))
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_manifest_survives_json():
    again = Manifest.from_json(MANIFEST.to_json())
    assert again == MANIFEST
    assert Manifest(7, {}, {}, "0.1.0").identity != Manifest(7, {}, {}, "0.1.0").identity


def test_what_is_committed_is_read(path):
    directory = StateDirectory(path)
    directory.commit(MANIFEST)
    assert directory.manifest is MANIFEST
    assert state_directory.read(path) == MANIFEST
    assert sorted(file.name for file in path.iterdir()) == ["lock", "manifest.json"]


def test_a_commit_that_fails_leaves_the_last_one(path):
    directory = StateDirectory(path)
    directory.commit(MANIFEST)
    (path / "manifest.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        directory.commit(Manifest(8, {}, {}, "0.1.0"))
    assert directory.manifest is MANIFEST
    assert state_directory.read(path) == MANIFEST


def test_only_files_of_values_that_nobody_needs_are_removed(path):
    directory = StateDirectory(path)
    directory.commit(MANIFEST)
    for name in (FILE, "5-1700000000000000", "notes.txt"):
        (path / name).write_text("")
    state_directory.clean(path, MANIFEST.checksums.keys())
    assert sorted(file.name for file in path.iterdir()) == [FILE, "lock", "manifest.json", "notes.txt"]
    state_directory.clean(path / "gone", ())


def test_a_checksum_tells_bytes_apart():
    """Also from those in another order."""
    assert state_directory.checksum(b"\1\0" * 4096) == state_directory.checksum(bytearray(b"\1\0" * 4096))
    assert state_directory.checksum(b"\1\0" * 4096) != state_directory.checksum(b"\0\1" * 4096)


# --- refusals ---------------------------------------------------------------------------------------------------


def test_files_of_others_are_left_alone(path):
    path.mkdir()
    (path / "notes.txt").write_text("")
    with pytest.raises(StateError, match=r"expected an empty directory .*/state', which holds 'notes\.txt'\. Move"):
        StateDirectory(path)
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_a_directory_in_use_is_refused_until_its_process_has_ended(path):
    with other_process(COMMIT, path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "done\n"
        with pytest.raises(StateError, match=f"no other training keeps its state in.* which process {other.pid} does"):
            StateDirectory(path)
        with (
            pytest.raises(StateError, match=f"a training that has ended.* in which process {other.pid} keeps"),
            state_directory.reading(path),
        ):
            pass
        other.kill()
    with state_directory.reading(path) as manifest:
        assert manifest.steps == 7


def test_two_trainings_in_one_process_need_two_directories(path):
    first = StateDirectory(path)
    with pytest.raises(StateError, match=f"which process {os.getpid()} does. Name another one"):
        StateDirectory(path)
    first.commit(MANIFEST)
    with state_directory.reading(path) as manifest:  # but what one has written may be read
        assert manifest == MANIFEST
    del first
    assert StateDirectory(path).manifest == MANIFEST


def test_a_state_that_was_not_read_is_not_replaced(path):
    with other_process(COMMIT, path) as other:
        other.communicate("\n")
    stale = (
        f"received '{path}', which holds that of step 7. Go on from it with graphswap.restore(model, '{path.parent}')"
    )
    with pytest.raises(StateError, match=re.escape(stale)):
        StateDirectory(path)
    with state_directory.reading(path) as manifest:
        state_directory.trust(manifest)
    StateDirectory(path).commit(MANIFEST)


def test_a_directory_without_a_state_is_refused(path):
    with (
        pytest.raises(StateError, match=r"No such file or directory: '.*manifest\.json'\. Name the directory"),
        state_directory.reading(path),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("", "something else (JSONDecodeError: "),
        ("[1]", "something else (TypeError: "),
        ("{}", "something else (KeyError: 'format')"),
        (json.dumps({"format": 99, "graphswap": "9.0"}), "format 99, of graphswap 9.0"),
        (MANIFEST.to_json().replace(FILE, "../../etc/passwd"), "a file with another name: ../../etc/passwd"),
        (MANIFEST.to_json().replace(f'"{SMALL}": 9', '"5-1": 9'), f"something else (KeyError: '{SMALL}')"),
        (MANIFEST.to_json()[:-20], "something else (JSONDecodeError: "),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(path, text, received):
    path.mkdir()
    (path / "manifest.json").write_text(text)
    expected = re.escape(f"expected a manifest of format 2 in '{path}/manifest.json', received {received}")
    for read in (state_directory.read, StateDirectory):
        with pytest.raises(StateError, match=f"{expected}.*Read it with the version of graphswap that wrote it"):
            read(path)
