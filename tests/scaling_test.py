import json
import random

import pytest
import testing

from graphswap import blocks, ir, parser
from graphswap.tools import scaling


def step(batch: int) -> ir.Graph:
    return testing.replicated(testing.random_graph(random.Random(6), 24, 64 * batch), 2)


def test_blocks_beside_sums_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "MODELS", {"random": step})
    monkeypatch.setattr(scaling, "_BITS_PER_SECOND", 4e9)  # for gradients of some KiB
    out = tmp_path / "scaling.json"
    scaling.main(["scaling", "--model=random", "--batch=1", "--workers=1,8,64", "--latency=1e-9", f"--out={out}"])
    found = json.loads(out.read_text())
    alone, *others = found["cases"]
    assert found["is_simulated"]
    assert alone["at_once"] == alone["in_blocks"]
    assert alone["blocks"] == alone["network_seconds"] == 0
    for case in others:
        assert alone["in_blocks"] <= case["in_blocks"] < case["at_once"]
        assert case["blocks"]
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert scaling.table(found["cases"]) in printed


def test_a_step_that_has_no_plan():
    case = {"workers": 8, "at_once": None, "in_blocks": 2.0, "blocks": 3, "network_seconds": 0.5}
    assert "no plan" in scaling.table([case])


def test_gradients_are_packed_as_tensorflow_packs_them():
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    optimizer = scaling._Summing(keras.optimizers.SGD(0.1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    graph = scaling.steps.trace(model, optimizer, loss, 8)
    (one,) = blocks.packed(scaling.of_workers(graph, 64))
    assert [graph.value(value).shape for value in one.values] == [(2,), (6,), (3,), (12,)]
    assert parser.parse(str(graph)) == graph


@pytest.mark.parametrize("workers", ["0", "two", "8,", "-1"])
def test_a_number_of_workers_that_is_none(workers):
    with pytest.raises(SystemExit, match="--workers: expected numbers from 1 on, received"):
        scaling.main(["scaling", f"--workers={workers}"])
