import model_data_test

from graphswap.strategies.zero_offload import ZeroOffload


def test_all_optimizer_state_leaves_at_once_and_weights_stay():
    (group,) = ZeroOffload().groups(model_data_test.STEP, model_data_test.ALL)
    assert sorted(group) == [f"m{layer}" for layer in range(model_data_test.LAYERS)]


def test_without_state_nothing_leaves():
    assert ZeroOffload().groups(model_data_test.STEP, ["w0", "w1"]) == []
