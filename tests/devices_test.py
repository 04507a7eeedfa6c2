import pytest

from graphswap.devices import DEVICES


@pytest.mark.parametrize("name", DEVICES)
def test_copies_run_beside_compute(name):
    device = DEVICES[name]
    assert device.name == name
    assert all(link.overlaps for link in device.links.values())
    assert device.links["host"].out_bytes_per_second < device.memory_bytes_per_second < device.flops_per_second


def test_newer_is_faster():
    rates = [DEVICES[name].flops_per_second for name in ("v100", "a100", "h100")]
    assert rates == sorted(rates)
    assert DEVICES["gh200"].links["host"].in_bytes_per_second > 5 * DEVICES["h200"].links["host"].in_bytes_per_second
