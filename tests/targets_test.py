"""What is compiled for a GPU that is not here, and how the table shows it."""

import importlib.util

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import small_gpu

from graphswap import devices, pjrt, simulator
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.tools import targets

SIZE = targets.Size(blocks=2, width=64, heads=2, length=64, batch=8)
MIB = 1 << 20


@pytest.fixture(scope="module")
def graph():
    return targets.traced(SIZE).graph


def test_a_row_shows_what_was_planned_predicted_and_compiled():
    memory = pjrt.Memory(arguments=3 * MIB, outputs=0, temp=MIB, host_temp=2 * MIB)
    copies = (pjrt.Copy("a", True, MIB, 2), pjrt.Copy("b", False, MIB, 0))
    row = targets._row("both", lambda: pjrt.Compiled(memory, copies, (1, 2), ""))
    assert row["copied_bytes"] == 2 * MIB
    row |= {"predicted_bytes": 5 * MIB, "compile_seconds": 7.2}
    assert targets.cells(row) == (
        *("both", "4.0MiB", "1.0MiB", "2.0MiB", "5.0MiB (+25.0%)", "1 of 1, 1 of 2", "1", "7 s"),
    )


def test_what_fails_is_a_row_too():
    def refuse():
        raise pjrt.DeviceError("no")

    row = targets._row("swap", refuse)
    assert row == {"name": "swap", "error": "no"}
    assert targets.cells(row) == ("swap", "no", *[""] * 6)


def test_each_way_does_what_it_says(graph):
    peak = simulator.simulate(graph, Plan(), CostModel(devices.DEVICES["h200"])).peak_bytes
    device = devices.DEVICES["h200"]
    plans = {way: targets.planned(graph, device, way, int(0.8 * peak), 0.5) for way in ("recompute", "swap", "both")}
    assert plans["recompute"].recomputes and not plans["recompute"].swaps
    assert plans["swap"].swaps
    for plan in plans.values():
        plan.check(graph)
        assert simulator.judge(graph, plan, CostModel(device)).allocated_peak_bytes <= int(0.8 * peak)


@small_gpu.needs_compiler
def test_jax_offloads_what_blocks_read():
    repeated, offloaded = (targets.jax_step(SIZE, small_gpu.TARGET, way) for way in ("remat", "offload"))
    nbytes = 4 * SIZE.blocks * SIZE.batch * SIZE.length * SIZE.width
    assert (repeated.memory.host_temp, offloaded.memory.host_temp) == (0, nbytes)
