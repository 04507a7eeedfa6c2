"""graphswap's gradients are plain Keras's, bit for bit, where other ways to recompute fail or go wrong."""

import pytest
import trainings

from graphswap.tools import peers


@pytest.fixture(scope="module", autouse=True)
def pins():
    with trainings.reproducible():
        yield


@pytest.mark.parametrize("kind", peers.KINDS)
def test_only_graphswap_runs_everywhere_and_is_right(kind):
    outcomes = {outcome.way: outcome for outcome in peers.compare(kind, blocks=3, size=16, batch=8)}
    print(peers.table(list(outcomes.values())))
    ours, recompute_grad = outcomes["graphswap"], outcomes["tf.recompute_grad"]
    assert (ours.error, ours.gradient_error, ours.state_error) == ("", 0, 0)
    assert "keywords arguments" in outcomes["keras.RematScope"].error
    remat = outcomes["keras.RematScope, no arguments"]
    if kind == "BatchNormalization":
        assert recompute_grad.state_error > 1e-3  # the moving statistics are updated twice
        assert remat.gradient_error > 1e-3  # the block is repeated as in inference
    if kind == "Dropout":
        assert recompute_grad.gradient_error > 1e-3  # the mask of the backward pass is another one
        assert remat.gradient_error > 1e-3


def test_the_table_tells_right_from_wrong():
    outcomes = [
        peers.Outcome("Dropout", "graphswap", step_bytes=1 << 20),
        peers.Outcome("Dropout", "tf.recompute_grad", gradient_error=0.05),
        peers.Outcome("Dropout", "keras.RematScope", error="no keywords"),
    ]
    lines = peers.table(outcomes).splitlines()[-3:]
    for line, parts in zip(lines, (["equal", "1.0MiB"], ["off by 5.0e-02"], ["fails: no keywords"]), strict=True):
        assert all(part in line for part in parts)
