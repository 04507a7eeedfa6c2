import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from graphswap.tools import graphswap_cli, launch

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _checkout_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def script(tmp_path):
    """Writes a script that knows its task, and returns its path."""

    def write(text):
        path = tmp_path / "script.py"
        start = "import json, os, sys, time\ntask = json.loads(os.environ['TF_CONFIG'])['task']\n"
        path.write_text(start + textwrap.dedent(text))
        return str(path)

    return write


def test_every_task_gets_its_tf_config():
    configs = launch.cluster_configs(workers=2, ps=1)
    assert [str(task) for task in configs] == ["chief 0", "worker 0", "worker 1", "ps 0"]
    read = {str(task): json.loads(config) for task, config in configs.items()}
    assert read["ps 0"]["task"] == {"type": "ps", "index": 0}
    clusters = [config["cluster"] for config in read.values()]
    assert all(cluster == clusters[0] for cluster in clusters)
    assert {job: len(hosts) for job, hosts in clusters[0].items()} == {"chief": 1, "worker": 2, "ps": 1}
    hosts = [host for hosts in clusters[0].values() for host in hosts]
    assert len(set(hosts)) == 4


def test_without_parameter_servers_worker_0_is_the_chief():
    assert [str(task) for task in launch.cluster_configs(2)] == ["worker 0", "worker 1"]


def test_output_says_whose_it_is(script, capsys):
    path = script("print('in', *sys.argv[1:]); print('bad', file=sys.stderr)")
    assert launch.launch([path, "--x", "a"], workers=2) == 0
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == ["[worker 0] in --x a", "[worker 1] in --x a"]
    assert sorted(captured.err.splitlines()) == ["[worker 0] bad", "[worker 1] bad"]


def test_workers_on_emulated_accelerators(script, capsys):
    path = script("""
    import tensorflow as tf
    tf.zeros([])
    print(os.environ['TF_CPU_BFC_MEM_LIMIT_IN_MB'], tf.config.experimental.get_memory_info('CPU:0')['current'])
    """)
    assert launch.launch([path], workers=2, memory_bytes=20 << 20) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[worker 0] 20 0", "[worker 1] 20 0"]


def test_the_first_failure_ends_the_others(script, capsys):
    path = script("""
    if task['index'] == 1:
        time.sleep(0.5)
        sys.exit(7)
    time.sleep(60)
    """)
    start = time.monotonic()
    assert launch.launch([path], workers=3) == 7
    assert time.monotonic() - start < 20
    assert capsys.readouterr().err == "graphswap launch: worker 1 ended with exit status 7; the others are ended.\n"


def test_a_task_that_does_not_end_when_asked_is_killed(script, capsys, monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE_SECONDS", 0.5)
    path = script("""
    import signal
    if task['index'] == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    """)
    assert launch.launch([path], workers=2) == 128 + signal.SIGKILL
    assert "worker 0 was ended by SIGKILL; the others are ended." in capsys.readouterr().err


def test_the_cluster_ends_with_its_chief(script, capsys):
    path = script("""
    if task['type'] != 'chief':
        time.sleep(60)
    print('done')
    """)
    start = time.monotonic()
    assert launch.launch([path], workers=1, ps=1) == 0
    assert time.monotonic() - start < 20
    assert capsys.readouterr().out == "[chief 0] done\n"


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_outlives_the_launcher(number, status, script):
    path = script("""
    import subprocess
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    print(os.getpid(), child.pid)
    time.sleep(60)
    """)
    command = [sys.executable, "-m", "graphswap", "launch", "--workers=2", "--", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(2)]
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    # What a worker starts is ended with it, unless nobody is left to do so.
    pids = [int(pid) for line in lines for pid in line[2 : 3 if number == signal.SIGKILL else 4]]
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))
    for line in lines:
        if is_alive(line[3]):
            os.kill(int(line[3]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "script.py"], "expected --workers=NUMBER, received no --workers."),
        (["--workers=0", "script.py"], "--workers"),
        (["--workers=2"], "script: expected a Python file to run, received nothing. Name it after `--`."),
        (["--workers=2", "no.py"], "script: expected a Python file to run, received 'no.py', which is no file."),
        (["--workers=2", "--memory=3", __file__], "expected a size such as"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert graphswap_cli.main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err
