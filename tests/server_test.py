import json
import socket

import pytest
import tensorflow as tf

from graphswap import parameter_server, server
from graphswap.cost_model import DeviceSpec, Link
from graphswap.distribute import WorkerError
from graphswap.options import Options

CLUSTER = {"chief": ["localhost:1"], "worker": ["localhost:2", "localhost:3"], "ps": ["localhost:4"]}


def config(**changes):
    return json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 0}, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a field 'cluster', received no TF_CONFIG."),
        ("{", "expected JSON, received '{'"),
        (config(cluster=None), "expected a field 'cluster', received {"),
        (config(task=None), "expected a field 'task', received {"),
        (config(cluster={**CLUSTER, "ps": []}), "expected addresses of the job 'ps', received {"),
        (config(cluster={"worker": ["a:1"], "ps": ["b:1"]}), "expected addresses of the job 'chief', received {"),
        (config(task={"index": 0}), r"expected a task of a type in \('chief', 'worker', 'ps'\), received {'index': 0}"),
        (
            config(task={"type": "worker"}),
            "expected a task with an index below 2, the number of tasks of the job 'worker'",
        ),
        (
            config(task={"type": "ps", "index": 1}),
            "expected a task with an index below 1, the number of tasks of the job",
        ),
    ],
)
def test_a_tf_config_that_lacks_something_is_refused(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=f"^TF_CONFIG: {message}"):
        server.serve()


@pytest.mark.parametrize("job", ["chief", "worker", "ps"])
def test_a_port_in_use_is_refused(monkeypatch, job):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"localhost:{other.getsockname()[1]}"
        monkeypatch.setenv("TF_CONFIG", config(cluster={**CLUSTER, job: [address]}, task={"type": job, "index": 0}))
        with pytest.raises(
            ValueError, match=f"expected a free port for {job} 0, received {address}: Address already in"
        ):
            server.serve()


def test_the_chief_names_those_that_do_not_answer(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        there = f"localhost:{other.getsockname()[1]}"
        monkeypatch.setenv("TF_CONFIG", config(cluster={**CLUSTER, "ps": [there]}, task={"type": "chief", "index": 0}))
        monkeypatch.setattr(server, "STARTING_SECONDS", 0.2)
        monkeypatch.setattr(server, "_expect_free", lambda task: None)
        with pytest.raises(
            WorkerError,
            match=r"received no answer of worker 0 \(localhost:2\), worker 1 \(localhost:3\)\. Start the same",
        ):
            server.serve()


def test_facts_are_read_as_they_were_written():
    device = DeviceSpec("CPU:0/2", 1 << 30, links={"host": Link(), "disk": Link()})
    facts = server.Facts({"version of graphswap": "1"}, 1 << 30, device, 4096, 8192)
    assert server.Facts.from_json(facts.to_json()) == facts


class Told:
    """In the place of the other processes of a cluster: says what they would, and notes what they are told."""

    def __init__(self, monkeypatch, facts):
        self.errors = []
        self.workers = object.__new__(parameter_server.Workers)
        self.workers._facts = {}
        self.workers.devices = {name: name for name in facts}
        monkeypatch.setattr(server, "read_facts", facts.__getitem__)
        monkeypatch.setattr(server, "tell", lambda devices, error: self.errors.append((devices, str(error))))


def test_parameter_servers_smaller_than_the_model_are_refused_on_all(monkeypatch):
    facts = {
        "worker 0": server.Facts(server.versions(), 1 << 30, DeviceSpec()),
        "ps 0": server.Facts(server.versions(), 3 << 20),
        "ps 1": server.Facts(server.versions(), 2 << 20),
    }
    told = Told(monkeypatch, facts)
    told.workers.expect_room(5 << 20)
    with pytest.raises(WorkerError, match=r"gradients, 6\.0MiB, received 5\.0MiB in ps 0, ps 1\. Add servers") as error:
        told.workers.expect_room(6 << 20)
    assert told.errors == [(["worker 0", "ps 0", "ps 1"], str(error.value))]


def test_workers_with_different_memory_are_refused_on_all(monkeypatch):
    devices = [DeviceSpec("CPU:0/2", (1 + i) << 30) for i in range(2)]
    facts = {f"worker {i}": server.Facts(server.versions(), 8 << 30, device) for i, device in enumerate(devices)}
    told = Told(monkeypatch, facts)
    with pytest.raises(
        WorkerError, match=r"same memory of the device in every worker, received 1\.0GiB in worker 0 and"
    ):
        told.workers.facts()
    assert told.errors[0][0] == ["worker 0", "worker 1"]


def test_hosts_of_different_memory_may_have_equal_devices(monkeypatch):
    facts = {f"worker {i}": server.Facts(server.versions(), (1 + i) << 30, DeviceSpec()) for i in range(2)}
    told = Told(monkeypatch, facts)
    assert [*told.workers.facts()] == [*facts]


def test_an_order_to_look_is_awaited(monkeypatch):
    answers = iter([server.Facts({}, 0, peak_bytes=9, order=3), server.Facts({}, 0, peak_bytes=5, order=4)])
    monkeypatch.setattr(server, "_NUMBERS", iter([4]))
    monkeypatch.setattr(server, "_order", lambda devices, order: devices)
    monkeypatch.setattr(server, "read_facts", lambda device: next(answers))
    (facts,) = server.look(["worker 0"], forgets=True)
    assert facts.peak_bytes == 5


def test_a_process_that_is_lost_meanwhile_is_left_out(monkeypatch):
    def lost(device):
        raise tf.errors.UnavailableError(None, None, "gone")

    monkeypatch.setattr(server, "_order", lambda devices, order: devices)
    monkeypatch.setattr(server, "read_facts", lost)
    assert server.look(["worker 0"]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"swap_to": "disk"}, "expected swap_to='auto' or 'host' under ParameterServerStrategy, received 'disk'"),
        (
            {"on_unsupported": "run_unchanged"},
            "expected on_unsupported='raise' under ParameterServerStrategy, received 'run_unchanged'. Leave it out",
        ),
    ],
)
def test_what_workers_can_not_do_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parameter_server.WorkerSession(Options("1GiB", **given), object.__new__(parameter_server.Workers))
