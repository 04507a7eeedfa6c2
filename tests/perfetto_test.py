"""The trace is what Perfetto reads: processes, lanes, events that do not overlap, counters."""

import collections
import json

import exchange_test
import pictures
import pytest

from graphswap import perfetto, rewrites
from graphswap.plan import Plan


def events(**changes):
    return json.loads(perfetto.trace(pictures.picture(**changes)))["traceEvents"]


def named(found, what):
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["ph"] == "M" and e["name"] == what}


def test_plain_and_planned_are_processes_and_measured_is_a_third_one():
    assert list(named(events(), "process_name").values()) == ["plain, simulated", "planned, simulated"]
    found = events(measured=pictures.MEASURED)
    assert list(named(found, "process_name").values()) == ["plain, simulated", "planned, simulated", "measured"]
    counted = [(e["ts"], e["args"]["bytes"]) for e in found if e["ph"] == "C" and e["pid"] == 3]
    assert counted == [(1e6 * seconds, nbytes) for seconds, nbytes in pictures.MEASURED]


def test_every_step_is_an_event_in_its_lane():
    found, picture = events(), pictures.picture()
    lanes = named(found, "thread_name")
    complete = [e for e in found if e["ph"] == "X" and e["pid"] == 2]
    assert [(e["name"], e["cat"]) for e in complete] == [(step.name, step.kind) for step in picture.planned.steps]
    by_kind = {(e["cat"], lanes[2, e["tid"]]) for e in complete}
    assert by_kind == {
        ("run", "compute"),
        ("recompute", "compute"),
        ("swap_out", "swap out to host"),
        ("swap_in", "swap in from host"),
    }
    assert {e["args"]["reason"] for e in complete if "args" in e} == {"idle for long", "cheap to make"}


def test_times_are_microseconds_and_scaled():
    last = [e for e in events(time_scale=2.0) if e["ph"] == "X" and e["pid"] == 1][-1]
    assert last["ts"] + last["dur"] == pytest.approx(2e6 * pictures.picture().plain.seconds)


def test_events_of_one_lane_do_not_overlap():
    lanes = collections.defaultdict(list)
    for event in events(time_scale=1 / 3):
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000)))
    for lane in lanes.values():
        for (start, length), (later, _) in zip(lane, lane[1:], strict=False):
            assert start + length <= later


def test_the_counter_reaches_the_peak():
    for pid, timeline in ((1, pictures.picture().plain), (2, pictures.picture().planned)):
        counted = [e["args"]["bytes"] for e in events() if e["ph"] == "C" and e["pid"] == pid]
        assert max(counted) == timeline.peak_bytes


def test_title_and_facts_are_kept():
    assert json.loads(perfetto.trace(pictures.picture()))["otherData"] == {"title": "a chain", "device": "none"}


def test_blocks_of_gradients_have_a_lane():
    graph = rewrites.exchange(exchange_test.STEP, exchange_test.TWO)
    found = events(**pictures.simulated(graph, Plan(decisions=exchange_test.TWO.decisions)))
    lanes = named(found, "thread_name")
    sums = [e["name"] for e in found if e["ph"] == "X" and lanes[e["pid"], e["tid"]] == "network" and e["pid"] == 2]
    assert sums == ["sum/block_0", "sum/block_1"]


def test_copies_of_variables_have_lanes_of_their_tier():
    found = events(**pictures.simulated(pictures.FAR, pictures.COPIED))
    lanes = named(found, "thread_name")
    copies = {(e["name"], lanes[2, e["tid"]]) for e in found if e["ph"] == "X" and e["cat"] in ("fetch", "store")}
    assert copies == {("fetch", "variables from ps"), ("store", "variables to ps")}
