"""What is compiled for a GPU that is not here, and how the table shows it."""

import dataclasses
import importlib.util

import pytest

if not importlib.util.find_spec("jax"):
    pytest.skip("needs graphswap[pjrt]", allow_module_level=True)

import small_gpu

from graphswap import devices, pjrt, simulator, stablehlo_export
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.tools import jax_gpt, targets

SIZE = targets.Size(blocks=2, width=64, heads=2, length=64, batch=8)
MIB = 1 << 20


@pytest.fixture(scope="module")
def step():
    return targets.traced(SIZE)


@pytest.fixture
def graph(step):
    return step.graph


def test_a_row_shows_what_was_planned_predicted_and_compiled():
    memory = pjrt.Memory(arguments=3 * MIB, outputs=0, temp=MIB, host_temp=2 * MIB)
    copies = (pjrt.Copy("a", True, MIB, 2), pjrt.Copy("b", False, MIB, 0))
    row = targets._row("both", lambda: pjrt.Compiled(memory, copies, (1, 2), ""))
    assert row["copied_bytes"] == 2 * MIB
    row |= {"predicted_bytes": 5 * MIB, "compile_seconds": 7.2}
    shown = ("both", "4.0MiB", "1.0MiB", "2.0MiB", "5.0MiB (+25.0%)", "1 of 1, 1 of 2")
    assert targets.cells(row) == (*shown, "1", "7 s")
    assert targets.cells(row | {"planned_beside": 2}) == (*shown, "1, planned 2", "7 s")


def test_copies_that_are_planned_beside_nodes_are_counted():
    steps = (
        ("a", "run", 0.0, 1.0),
        ("a", "swap_out", 1.0, 3.0),  # beside b
        ("b", "run", 1.0, 2.0),
        ("b", "swap_out", 3.0, 4.0),  # c waits for it
        ("view", "run", 3.5, 3.5),
        ("a", "swap_in", 4.5, 6.0),  # beside c, which has begun
        ("c", "recompute", 4.0, 5.0),
    )
    timeline = simulator.Timeline(
        tuple(simulator.Step(*step, live_bytes=0) for step in steps), 0, 0, 6.0, 0, 1.0, simulator.Step(*steps[0], 0)
    )
    assert targets.copies_beside_nodes(timeline) == 2


def test_what_fails_is_a_row_too():
    def refuse():
        raise pjrt.DeviceError("no")

    row = targets._row("swap", refuse)
    assert row == {"name": "swap", "error": "no"}
    assert targets.cells(row) == ("swap", "no", *[""] * 6)


def test_each_way_does_what_it_says(graph):
    peak = simulator.simulate(graph, Plan(), CostModel(devices.DEVICES["h200"])).peak_bytes
    device = devices.DEVICES["h200"]
    ways = ("recompute", "swap", "both")
    plans = {way: targets.Way(way, 0.5).plan(graph, CostModel(device), int(0.8 * peak)) for way in ways}
    assert plans["recompute"].recomputes and not plans["recompute"].swaps
    assert plans["swap"].swaps
    for plan in plans.values():
        plan.check(graph)
        assert simulator.judge(graph, plan, CostModel(device)).allocated_peak_bytes <= int(0.8 * peak)


@small_gpu.needs_compiler
def test_jax_offloads_what_blocks_read():
    repeated, offloaded = (
        targets.jax_step(SIZE, small_gpu.TARGET, way) for way in ("remat of blocks", "offloads what blocks read")
    )
    nbytes = 4 * SIZE.blocks * SIZE.batch * SIZE.length * SIZE.width
    assert (repeated.memory.host_temp, offloaded.memory.host_temp) == (0, nbytes)


@dataclasses.dataclass(frozen=True)
class Exported:
    plan: Plan
    state: tuple[()] = ()


def test_plans_are_tightened_until_the_compiled_step_keeps_the_budget(monkeypatch, step):
    def compile_for(exported, target, options):
        """What the simulator says, and a tenth more."""
        nbytes = int(1.1 * simulator.simulate(step.graph, exported.plan, CostModel()).peak_bytes)
        return pjrt.Compiled(pjrt.Memory(nbytes, 0, 0, 0), (), (0, 0), "")

    monkeypatch.setattr(targets, "traced", lambda size: step)
    monkeypatch.setattr(stablehlo_export, "export", lambda func_graph, graph, plan: Exported(plan))
    monkeypatch.setattr(pjrt, "compile_for", compile_for)
    monkeypatch.setattr(jax_gpt, "WAYS", ())
    found = list(targets.rows(SIZE, small_gpu.TARGET, devices.DEVICES["h200"], 0.9, 0.5))
    assert [row["name"] for row in found[:3]] == [
        *("plain", "XLA's rematerialisation", "XLA's rematerialisation and offloading")
    ]
    for way in ("recompute", "swap", "both"):
        rows = [row for row in found if row["name"] == f"graphswap, {way}"]
        assert any(row["device_bytes"] <= row["budget_bytes"] for row in rows)
