"""Steps on disk: what is written is read, and nothing else."""

import dataclasses
import json
import os
import sys

import ml_dtypes
import numpy as np
import pytest

from graphswap import artefact
from graphswap.artefact import Array, Artefact, ArtefactError, Manifest

STEP = Artefact(
    Manifest(
        name="step",
        inputs=(Array("x", "float32", (2, 3)),),
        state=(
            Array("w", "bfloat16", (3,), result=1, is_variable=True),
            Array("count", "int64", (), result=2, is_variable=True),
            Array("table", "float32", (1, 2)),
        ),
        results=(Array("0", "float32", ()),),
        fingerprint="abc",
        plan={"order": [], "decisions": []},
        swapped=(2, 3),
        versions={"jax": "0.10.2"},
    ),
    b"module",
    (
        np.array([1.5, np.nan, -0.0], ml_dtypes.bfloat16),
        np.array(2**40, np.int64),
        np.array([[1.0, -0.0]], np.float32),
    ),
)


@pytest.fixture
def folder(tmp_path):
    artefact.write(STEP, tmp_path / "step")
    return tmp_path / "step"


def refusal(folder):
    with pytest.raises(ArtefactError) as error:
        artefact.read(folder)
    return str(error.value)


def damage(reason):
    return (
        "expected a step as written by `graphswap export --format=stablehlo`, received '{}', which is damaged: "
        f"{reason}. Export the step again."
    )


def test_what_is_written_is_read(folder):
    read = artefact.read(folder)
    assert (read.manifest, read.module) == (STEP.manifest, STEP.module)
    for entry, value, expected in zip(read.manifest.state, read.state, STEP.state, strict=True):
        assert (value.dtype, value.shape) == (artefact.dtype(entry.dtype), entry.shape)
        assert value.tobytes() == expected.tobytes()


def test_it_is_three_files_and_leaves_no_others(folder):
    assert sorted(os.listdir(folder)) == ["manifest.json", "state.npz", "step.mlirbc"]
    assert os.listdir(folder.parent) == ["step"]
    assert str(STEP.manifest) == (
        "step 'step' with 1 inputs, 3 arrays of state and 1 results; 2 copies to the host and 3 back"
    )


def test_reading_needs_neither_tensorflow_nor_jax():
    assert artefact.__name__ in sys.modules
    assert not {"tensorflow", "jax"} & {name.partition(".")[0] for name in vars(artefact)}


def test_an_output_that_exists_is_refused(folder):
    with pytest.raises(ArtefactError) as error:
        artefact.write(STEP, folder)
    assert str(error.value) == (
        f"expected an output directory that does not exist, received '{folder}', which does. "
        "Remove it, or name another one."
    )


def test_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ArtefactError) as error:
        artefact.write(STEP, tmp_path / "no" / "step")
    assert str(error.value) == (
        f"expected an output directory in a folder that can be written to, received '{tmp_path}/no/step'. "
        "Make the folder, or name another one."
    )


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ArtefactError) as error:
        artefact.write(STEP, tmp_path / "step")
    assert str(error.value) == (
        f"writing '{tmp_path}/step' failed: No space left on device. Nothing was left there. "
        "Free space, or name another place."
    )
    assert not list(tmp_path.iterdir())


def test_what_is_no_step_is_refused(tmp_path):
    assert refusal(tmp_path / "no") == (
        f"expected a directory as written by `graphswap export --format=stablehlo`, received '{tmp_path}/no', whose "
        "manifest.json can't be read: No such file or directory. Export the step first."
    )


def test_another_version_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "graphswap step 2"}))
    assert refusal(folder) == (
        f"expected a step in the format 'graphswap step 1', received '{folder}' in the format 'graphswap step 2'. "
        "Export the step again with this version of graphswap."
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "manifest.json",
            b"{",
            "manifest.json is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("manifest.json", b"[]", "manifest.json has no format"),
        ("manifest.json", b'{"format": "graphswap step 1"}', "KeyError 'sha256'"),
        ("step.mlirbc", b"other", "'step.mlirbc' is not what was written"),
        ("state.npz", b"other", "'state.npz' is not what was written"),
        ("state.npz", None, "'state.npz' can't be read: No such file or directory"),
    ],
)
def test_damage_is_found(name, content, reason, folder):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert refusal(folder) == damage(reason).format(folder)


def test_a_field_of_the_wrong_kind_is_damage(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": [{"shape": 3}]}))
    assert "which is damaged: TypeError" in refusal(folder)


def test_arrays_are_matched():
    entries = STEP.manifest.inputs
    (array,) = artefact.matching(entries, [np.zeros((2, 3), "float32")], "argument")
    assert array.shape == (2, 3)
    with pytest.raises(ValueError) as error:
        artefact.matching(entries, [np.zeros((2, 3))], "argument")
    assert str(error.value) == (
        "argument 'x': expected float32[2,3], received float64[2,3]. Sizes are fixed at export."
    )
    with pytest.raises(ValueError) as error:
        artefact.matching(entries, [], "argument")
    assert str(error.value) == "expected 1 arguments, received 0: one for each of the manifest's."


def test_an_array_is_printed_as_its_type():
    assert str(dataclasses.replace(STEP.manifest.inputs[0], shape=())) == "float32[]"
