"""What a plan file keeps, what it refuses, and that a file is written whole or not at all."""

import dataclasses
import errno
import json
import math
import os
import stat

import pictures
import pytest
import testing

from graphswap import plan_file
from graphswap.allocator import Allocator
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile, Workspace
from graphswap.devices import DEVICES
from graphswap.plan import Declined, Plan, PlanError, Recompute, Swap
from graphswap.plan_file import PlanFile
from graphswap.simulator import NoRoom, simulate
from graphswap.strategies.joint import Joint

MIB = pictures.MIB
CHAIN = testing.chain(4)
PLAN = Plan(
    decisions=(
        Recompute(("f3",), before="b3", reason="cheap to make"),
        Swap("f1", "f2", freed_before="f3", in_after="b3", in_before="b1", reason="idle for long"),
    ),
    declined=(Declined("f2", "too late"),),
    strategy="by hand",
    memory_budget=7 * MIB,
    fingerprint=CHAIN.fingerprint,
)
PROFILE = Profile(
    CHAIN.fingerprint,
    {"f1": 0.002, "b1": 0.003},
    {"b2": Workspace((256,), (512, 1024))},
    {"host": Link(2e9, math.inf, 1e-4, overlaps=True)},
    time_scale=1.25,
    reserved_bytes=4096,
)
MEASURED = CostModel(DeviceSpec("gpu 0", 9 * MIB, holes=2, runs_pairs=True), PROFILE, MIB // 2, "host")
MADE = PlanFile(PLAN, CHAIN, MEASURED)


def fields(made=MADE):
    return json.loads(made.to_json())


def saved(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    return path


def refused(call, *arguments):
    with pytest.raises(PlanError) as error:
        call(*arguments)
    return str(error.value)


# --- reading back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [MEASURED, CostModel(DEVICES["v100"], far_tier="disk")], ids=["measured", "v100"])
def test_reading_gives_back_what_was_written(costs, tmp_path):
    made = PlanFile(PLAN, CHAIN, costs)
    read = plan_file.read(saved(tmp_path, made.to_json()))
    assert (read.plan, read.graph) == (PLAN, CHAIN)
    assert [vars(read.cost_model)] == [vars(costs)]
    assert read.judge().fields() == made.judge().fields()


def test_it_judges_as_the_simulator_does():
    judged = MADE.judge()
    assert judged.plain == simulate(CHAIN, Plan(), MEASURED)
    assert judged.planned == simulate(CHAIN, PLAN, MEASURED, allocator=Allocator(9 * MIB))
    assert judged.fields() == {
        "plain_peak_bytes": judged.plain.peak_bytes,
        "plain_seconds": 1.25 * judged.plain.seconds,
        "predicted_peak_bytes": judged.planned.allocated_peak_bytes,
        "predicted_seconds": 1.25 * judged.planned.seconds,
        "swapped_bytes": MIB,
        "recomputed_seconds": 1.25 * 10e-6,
        "bound_seconds": None,
    }
    assert judged.rows()[0] == ("plain peak", "7.5MiB")
    assert judged.rows()[-1] == ("no plan takes less than", "-")


def test_it_judges_on_another_device():
    device = DEVICES["a100"]
    judged = MADE.judge(device)
    costs = CostModel(device, far_tier="host")
    assert (judged.plain, judged.planned) == (simulate(CHAIN, Plan(), costs), simulate(CHAIN, PLAN, costs))
    assert (judged.time_scale, judged.bound_seconds) == (1.0, None)


def test_a_device_without_room_is_told():
    with pytest.raises(NoRoom):
        dataclasses.replace(MADE, plan=PLAN.replace(memory_budget=None)).judge(DeviceSpec(memory_bytes=3 * MIB))


def test_the_bound_is_that_of_the_plans_certificate(tmp_path):
    costs = CostModel(DEVICES["v100"])
    graph = testing.chain(8)
    plan = Joint(planning_seconds=0.5).plan(graph, costs, 8 * MIB)
    read = plan_file.read(saved(tmp_path, PlanFile(plan, graph, costs).to_json()))
    assert plan.certificate is not None
    assert read.judge().bound_seconds == plan.certificate.seconds(8 * MIB) <= read.judge().planned.seconds
    assert read.judge(DEVICES["h100"]).bound_seconds is None
    assert read.judge().rows()[-1] == ("no plan takes less than", f"{read.judge().bound_seconds:.4f} s")


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "plan.json"
    assert refused(plan_file.read, path) == (
        f"expected a plan file, received '{path}', which can't be read: No such file or directory."
    )


def test_a_folder(tmp_path):
    assert refused(plan_file.read, tmp_path) == (
        f"expected a plan file, received '{tmp_path}', which can't be read: Is a directory."
    )


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert (
        refused(plan_file.read, path) == f"expected a plan file, received '{path}', which can't be read: it is no text."
    )


def test_a_file_that_was_cut_off(tmp_path):
    assert refused(plan_file.read, saved(tmp_path, MADE.to_json()[:20])) == (
        "expected a plan file, received something that is no JSON: "
        "Unterminated string starting at: line 1 column 12 (char 11)."
    )


@pytest.mark.parametrize(
    "text", ["[]", "1", "{}", PLAN.to_json(), json.dumps({**fields(), "format": "graphswap plan 9"})]
)
def test_other_json(text, tmp_path):
    assert refused(plan_file.read, saved(tmp_path, text)) == (
        "expected a plan file as written by `graphswap plan`, received other JSON."
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"resident_bytes": None},
            "TypeError(\"int() argument must be a string, a bytes-like object or a real number, not 'NoneType'\")",
        ),
        ({"far_tier": "tape"}, "KeyError('tape')"),
        ({"profile": {}}, "KeyError('workspace')"),
        (
            {"device": {}},
            "ValueError('expected a device file as written by `graphswap calibrate`, received something else.')",
        ),
        ({"graph": "graph g("}, "ParseError('line 1: expected a node\\'s \"%name\", received the end of the text.')"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_part(change, reason, tmp_path):
    assert refused(plan_file.read, saved(tmp_path, json.dumps({**fields(), **change}))) == (
        f"expected a plan file as written by `graphswap plan`, received a damaged one: {reason}."
    )


@pytest.mark.parametrize("value", [None, 0, -1, "", "x", [], [1], {}, {"a": 1}, True], ids=str)
@pytest.mark.parametrize("name", sorted(set(fields()) - {"fingerprint", "format"}))
def test_no_damage_gets_through(name, value, tmp_path):
    if (name, type(value)) in {("resident_bytes", int), ("resident_bytes", bool), ("profile", type(None))}:
        return
    message = refused(plan_file.read, saved(tmp_path, json.dumps({**fields(), name: value})))
    assert message.startswith("expected a plan")


@pytest.mark.parametrize("name", sorted(set(fields()) - {"fingerprint"}))
def test_no_missing_part_gets_through(name, tmp_path):
    some = fields()
    del some[name]
    assert refused(plan_file.read, saved(tmp_path, json.dumps(some))).startswith("expected a plan file as written by")


def test_a_plan_that_does_not_fit_its_graph(tmp_path):
    some = {**fields(), "graph": str(testing.chain(3).replace(name="short"))}
    assert refused(plan_file.read, saved(tmp_path, json.dumps(some))) == (
        f"this plan was made for the graph with fingerprint {CHAIN.fingerprint}, but graph 'short' has "
        f"{testing.chain(3).replace(name='short').fingerprint}. Plan again for this graph."
    )


# --- a plan for a graph -------------------------------------------------------------------------------------------


def test_a_plan_file_gives_its_plan_and_its_costs(tmp_path):
    plan, costs = plan_file.given(saved(tmp_path, MADE.to_json()), CHAIN)
    assert plan == PLAN
    assert costs is not None and vars(costs) == vars(MEASURED)


def test_a_plan_by_itself_has_no_costs(tmp_path):
    assert plan_file.given(saved(tmp_path, PLAN.to_json()), CHAIN) == (PLAN, None)


def test_a_damaged_plan_file_is_not_taken_for_a_plan(tmp_path):
    text = json.dumps({**fields(), "graph": ""})
    assert refused(plan_file.given, saved(tmp_path, text), CHAIN).startswith("expected a plan file as written by")


def test_a_plan_by_itself_for_another_graph(tmp_path):
    message = refused(plan_file.given, saved(tmp_path, PLAN.to_json()), testing.chain(3))
    assert message.startswith(f"this plan was made for the graph with fingerprint {CHAIN.fingerprint}, ")


def test_what_is_no_plan(tmp_path):
    message = refused(plan_file.given, saved(tmp_path, "{}"), CHAIN)
    assert message == ("expected a plan as written by Plan.to_json, received something else: KeyError('decisions').")


@pytest.mark.parametrize(
    ("graph", "difference"),
    [
        (
            CHAIN.replace(nodes=(*CHAIN.nodes[:3], dataclasses.replace(CHAIN.nodes[3], op="Mul"), *CHAIN.nodes[4:])),
            "The first difference is node 3: planned was '%f2 = MatMul(%f1, %w) : (float32[512,512])', "
            "here is '%f2 = Mul(%f1, %w) : (float32[512,512])'.",
        ),
        (
            CHAIN.replace(nodes=CHAIN.nodes[:-1], outputs=("b2",)),
            "It has 10 nodes, here are 9.",
        ),
        (
            CHAIN.replace(outputs=("b2",)),
            "The nodes are the same: planned was 'graph chain(%w, %x) -> (%b1)', "
            "here is 'graph chain(%w, %x) -> (%b2)'.",
        ),
    ],
    ids=["another op", "a node less", "another result"],
)
def test_the_first_difference_is_named(graph, difference, tmp_path):
    path = saved(tmp_path, MADE.to_json())
    assert refused(plan_file.given, path, graph) == (
        f"expected a plan for graph 'chain', received '{path}', which is for another one. {difference} "
        "Plan again for this graph."
    )


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [DeviceSpec(), MEASURED.device, *DEVICES.values()], ids=lambda device: device.name)
def test_a_device_survives_writing(device):
    assert plan_file.device_from_fields(json.loads(json.dumps(plan_file.device_fields(device)))) == device


@pytest.mark.parametrize(
    ("change", "received"),
    [
        ({"format": "other"}, "something else"),
        ({"colour": 1}, "DeviceSpec.__init__() got an unexpected keyword argument 'colour'"),
        ({"links": {"host": {}}}, "'disk'"),
        ({"links": None}, "'NoneType' object is not subscriptable"),
    ],
    ids=["format", "field", "tier", "links"],
)
def test_what_is_no_device(change, received):
    with pytest.raises(ValueError) as error:
        plan_file.device_from_fields({**plan_file.device_fields(DeviceSpec()), **change})
    assert str(error.value) == f"expected a device file as written by `graphswap calibrate`, received {received}."


def test_a_device_with_a_number_out_of_range():
    with pytest.raises(ValueError) as error:
        plan_file.device_from_fields({**plan_file.device_fields(DeviceSpec()), "memory_bytes": -1})
    assert str(error.value) == (
        "DeviceSpec.memory_bytes: expected bytes > 0, or None, received -1. Correct it, or measure again."
    )


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "page.html"
    for text in ("first", "second ▇ –"):
        plan_file.write(path, text)
        assert path.read_bytes() == text.encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_link_stays_one(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    plan_file.write(link, "text")
    assert link.is_symlink() and target.read_text() == "text"


def test_what_is_no_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plan_file.write(pipe, "text")
    assert os.read(reader, 100) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_what_was_there(old, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    if old is not None:
        path.write_text(old)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        plan_file.write(path, "new")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        plan_file.write(tmp_path / "missing" / "plan.json", "text")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError):
        plan_file.write(tmp_path, "text")
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
