import pytest

from graphswap.tools import workers


def allocation(start, address, nbytes, op, region="output"):
    stats = {"addr": address, "requested_bytes": nbytes, "tf_op": op, "region_type": region}
    return start, 0, "MemoryAllocation", stats


def test_what_a_recorded_step_tells_of_its_gradients():
    gradients = {"makers": ["gradient_tape/a", "gradient_tape/b"], "sums": {"sgd/CollectiveReduceV2/block_0": 1000}}
    events = [
        (0, 100, "gradient_tape/a:MatMul", {}),
        allocation(0, 1, 1000, "gradient_tape/a"),
        allocation(0, 2, 9999, "gradient_tape/a", "temp"),
        (100, 80, "sgd/CollectiveReduceV2/block_0:CollectiveReduceV2", {}),
        allocation(100, 3, 500, "sgd/CollectiveReduceV2/block_0", "temp"),
        allocation(110, 4, 9999, "somebody"),
        (150, 50, "gradient_tape/b:MatMul", {}),
        (180, 0, "MemoryDeallocation", {"addr": 3}),
        allocation(190, 5, 256, "gradient_tape/b"),
    ]
    found = workers.seen(events, gradients)
    assert found["sums"] == 1
    assert found["first_start"] == pytest.approx(0.5)
    assert found["backward_seconds"] == pytest.approx(200e-12)
    assert found["beside_seconds"] == pytest.approx(80e-12)
    assert found["in_flight_bytes"] == 1000
    assert found["gradient_bytes"] == 1024 + 512


@pytest.mark.parametrize("flags", [["--workers=2"], ["--budget=1MiB", "--memory=much"], ["--budget=1MiB", "--model=x"]])
def test_bad_flags(flags):
    with pytest.raises(SystemExit, match="^workers: "):
        workers.main(["workers", *flags])
