"""Steps that XLA compiles: inside the budget by the allocator's count, with the numbers of the plain compiled step."""

import emulated
import numpy as np
import pytest
from memory_test import cnn, gpt

STEPS = 4
MODELS = {"cnn": cnn, "gpt": gpt}


def train(model_name, share):
    """Trains a few steps under XLA, in a share of the plain step's peak if one is given."""
    import keras
    import tensorflow as tf

    import graphswap

    keras.utils.set_random_seed(0)
    model, x, y = MODELS[model_name]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    option = {"graphswap": graphswap.Options(share, planning_seconds=3.0)} if share else {}
    model.compile("adam", loss, jit_compile=True, **option)
    losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
    result = {"losses": losses, "peak": tf.config.experimental.get_memory_info("CPU:0")["peak"]}
    if share:
        step = graphswap.report(model).step
        result |= {"predicted": step.predicted_peak_bytes, "text": str(step), "plan": len(step.plan.recomputes)}
    return result


@pytest.mark.parametrize(("model", "share"), [("cnn", 0.6), ("gpt", 0.6)])
def test_a_compiled_step_keeps_its_budget(model, share):
    plain = emulated.call(1 << 30, __file__, "train", model, None)
    budget = int(share * plain["peak"])
    ours = emulated.call(1 << 30, __file__, "train", model, budget)
    print(f"{model}: plain peak {plain['peak'] / 2**20:.1f}MiB; with graphswap {ours['text']}")
    assert ours["peak"] <= budget
    assert ours["predicted"] == pytest.approx(ours["peak"], rel=0.03)
    # A repeated node may be fused with others than its first run. LLVM contracts products and sums inside of a
    # fusion, and rounds once where it rounded twice before.
    np.testing.assert_allclose(ours["losses"], plain["losses"], rtol=1e-6)


if __name__ == "__main__":
    emulated.main(globals())
