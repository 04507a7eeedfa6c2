import pytest

from graphswap import new_directory


class Refusal(ValueError):
    pass


def test_what_was_written_takes_the_name_at_the_end(tmp_path):
    target = tmp_path / "made"
    with new_directory.made(target, Refusal) as directory:
        (directory / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("else")])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    target = tmp_path / "made"
    expected = (
        (Refusal, "failed: No space left on device. Nothing was left") if error.args[0] == 28 else (KeyError, "else")
    )
    with pytest.raises(expected[0], match=expected[1]), new_directory.made(target, Refusal) as directory:
        (directory / "file").write_text("content")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_stays(tmp_path):
    with pytest.raises(Refusal, match="does not exist, received"), new_directory.made(tmp_path, Refusal):
        pass
    assert tmp_path.is_dir()


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(Refusal, match="in a folder that can be written to"):
        new_directory.check(tmp_path / "none" / "made", Refusal)
