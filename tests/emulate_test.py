import functools
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from graphswap import emulate

ROOT = pathlib.Path(__file__).parent.parent
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _checkout_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def script(tmp_path):
    """Writes a script, with a module beside it, and returns its path."""
    (tmp_path / "beside.py").touch()

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def test_environment(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    assert emulate.environment(300 * MIB + 5) == {
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": "300",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GRAPHSWAP_EMULATED_MEMORY": str(300 * MIB),
    }


def test_environment_keeps_the_log_level(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    assert emulate.environment(MIB)["TF_CPP_MIN_LOG_LEVEL"] == "0"


def test_the_limit_is_set_in_whole_mebibytes():
    with pytest.raises(ValueError) as error:
        emulate.environment(MIB - 1)
    assert (
        str(error.value) == "memory: expected at least 1048576 bytes, received 1048575. The limit is set in whole MiB."
    )


def test_reserve_needs_an_emulated_device(monkeypatch):
    monkeypatch.delenv(emulate.MEMORY_VARIABLE, raising=False)
    with pytest.raises(RuntimeError) as error:
        emulate.reserve()
    assert str(error.value) == (
        "expected a process with the variables of graphswap.emulate.environment, received one without "
        "GRAPHSWAP_EMULATED_MEMORY. Start it with `graphswap run --memory=SIZE -- SCRIPT`."
    )


@pytest.mark.parametrize(
    ("argv", "received"), [([], "nothing"), (["missing.py", "--x"], "'missing.py', which is no file")]
)
def test_there_must_be_a_script(argv, received):
    with pytest.raises(ValueError) as error:
        emulate.run_script(MIB, argv)
    assert str(error.value) == f"script: expected a Python file to run, received {received}. Name it after `--`."


def test_a_script_has_the_whole_memory_as_one_region_and_no_more(script, capfd):
    status = emulate.run_script(
        100 * MIB,
        [
            script("""
            import tensorflow as tf

            def used():
                return tf.config.experimental.get_memory_info("CPU:0")

            print(used())
            most = tf.raw_ops.Empty(shape=[90 * 2**20], dtype=tf.uint8)
            print(used()["current"] >> 20)
            del most
            print(used()["current"])
            tf.zeros([100 * 2**20], tf.uint8)
            print("not reached")
            """)
        ],
    )
    captured = capfd.readouterr()
    assert captured.out.splitlines() == ["{'current': 0, 'peak': 0}", "99", "0"]
    last = captured.err.splitlines()[-1]
    assert last.startswith("tensorflow.python.framework.errors_impl.ResourceExhaustedError: ")
    assert "bfc_cpu_allocator_for_gpu" in last
    assert status == 1


def test_a_script_runs_as_if_python_had_started_it(script, capfd):
    path = script("""
    import sys

    import beside
    import tensorflow as tf

    from graphswap import emulate

    print(__name__, sys.argv, sys.path[0])
    tensor = tf.zeros([64])
    try:
        emulate.reserve()
    except RuntimeError as error:
        print(error)
    sys.exit(7)
    """)
    status = emulate.run_script(10 * MIB, [path, "--memory", "a b"])
    assert capfd.readouterr().out.splitlines() == [
        f"__main__ {[path, '--memory', 'a b']} {pathlib.Path(path).parent}",
        "expected a device without tensors, received one that has held 512B. "
        "Call reserve() before the first tensor is made.",
    ]
    assert status == 7


def test_signals_reach_the_script(script):
    path = script("""
    import time

    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    time.sleep(60)
    """)
    command = [sys.executable, "-m", "graphswap", "run", "--memory=10MiB", "--", path]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.stdout.readline() == "interrupted\n"
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
