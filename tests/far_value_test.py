"""A far value has memory of its own for each new value, two that take turns for planned steps, and no file too many."""

import numpy as np
import pytest
import tensorflow as tf

from graphswap import far_memory, tiers
from graphswap.far_value import FarValue
from graphswap.tiers import SwapSpaceError


def made(tier, directory, value=(1.0, 2.0), is_updated=False):
    far = FarValue(tf.float32, (2,), tiers.Tiers(directory))
    far.tier = tier
    far.assign(np.array(value, np.float32))
    far.reserve(is_updated)
    return far


def numbers(far):
    return far.view().view(np.float32).tolist()


def names(directory):
    return sorted(path.name for path in (directory / "state").iterdir() if path.name != "lock")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_only_steps_that_store_need_memory_for_two(tier, tmp_path):
    far = made(tier, tmp_path)
    assert not far.has_spare
    far.reserve(is_updated=True)
    assert far.has_spare
    assert (numbers(far), len(far.files())) == ([1, 2], 2 * (tier == "disk"))
    far.clear()
    assert (far.has_spare, far.tier, far.files()) == (False, "device", [])


def test_each_assignment_gets_a_file_and_the_one_of_before_goes(tmp_path):
    far = made("disk", tmp_path)
    before = names(tmp_path)
    far.assign(np.array([3, 4], np.float32))
    assert numbers(far) == [3, 4]
    assert len(names(tmp_path)) == 1
    assert names(tmp_path) != before


@pytest.mark.parametrize("room", [0, 1])
def test_a_move_that_finds_no_room_changes_nothing(room, tmp_path, monkeypatch):
    """Neither for the value nor, with room for one, for spare memory."""
    far = made("host", tmp_path, is_updated=True)
    left, full = [room], tiers.Tiers.memory

    def memory(self, tier, nbytes):
        if not left[0]:
            raise SwapSpaceError("no room")
        left[0] -= 1
        return full(self, tier, nbytes)

    monkeypatch.setattr(tiers.Tiers, "memory", memory)
    held = [far_memory.view(contents).ctypes.data for contents in far.contents()]
    with pytest.raises(SwapSpaceError, match="no room"):
        far.move("disk", far.tiers)
    assert [far_memory.view(contents).ctypes.data for contents in far.contents()] == held
    assert (far.tier, numbers(far)) == ("host", [1, 2])
    monkeypatch.undo()
    far.move("disk", far.tiers)
    assert (far.tier, numbers(far)) == ("disk", [1, 2])
    assert names(tmp_path) == sorted(file.name for file in far.files())


def test_what_was_kept_comes_back_after_a_step(tmp_path):
    far = made("disk", tmp_path, is_updated=True)
    kept, file = far.contents(), far.file()
    value, spare = far.handles
    tf.function(lambda: far_memory.store(tf.ones((2,)), value, spare) and None, autograph=False)()
    assert (numbers(far), far.file() == file) == ([1, 1], False)
    far.give(kept)
    assert (numbers(far), far.file() == file) == ([1, 2], True)
