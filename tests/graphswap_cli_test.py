import pytest

from graphswap import emulate
from graphswap.tools import graphswap_cli

RUN = "graphswap run --memory=300MiB -- train.py --epochs=2"


@pytest.fixture
def started(monkeypatch):
    """What `run` starts, instead of starting it."""
    calls = []
    monkeypatch.setattr(emulate, "run_script", lambda *arguments: calls.append(arguments) or 5)
    return calls


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_with_an_example(argv, capsys):
    assert graphswap_cli.main(argv) == 0
    text = capsys.readouterr().out
    for name, command in graphswap_cli.COMMANDS.items():
        assert command.example.startswith(f"graphswap {name}")
        assert f"  {name:10}{command.summary}" in text
        assert f"$ {command.example}" in text


@pytest.mark.parametrize("name", graphswap_cli.COMMANDS)
def test_help_of_a_command(name, capsys):
    assert graphswap_cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert [command.example in text for command in graphswap_cli.COMMANDS.values()].count(True) == 1
    own, _, _ = graphswap_cli.COMMANDS[name].example.partition(" -- ")
    named = [word.partition("=")[0] for word in own.split() if word.startswith("--")]
    assert all(f"\n  {flag} " in text for flag in named)


def test_no_command(capsys):
    assert graphswap_cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: graphswap COMMAND")


@pytest.mark.parametrize(
    ("name", "advice"), [("rnu", "Did you mean 'run'?"), ("fly", "`graphswap --help` lists them.")]
)
def test_an_unknown_command(name, advice, capsys):
    assert graphswap_cli.main([name]) == 2
    commands = ", ".join(graphswap_cli.COMMANDS)
    assert capsys.readouterr().err == f"graphswap: expected a command out of {commands}, received '{name}'. {advice}\n"


@pytest.mark.parametrize("separator", [["--"], []])
def test_run(separator, started):
    assert graphswap_cli.main(["run", "--memory=300MiB", *separator, "train.py", "--memory", "x", "--its"]) == 5
    assert started == [(300 << 20, ["train.py", "--memory", "x", "--its"])]


def test_run_takes_the_arguments_of_the_process(started, monkeypatch):
    monkeypatch.setattr("sys.argv", ["graphswap", "run", "--memory", "1MiB", "train.py"])
    assert graphswap_cli.main() == 5
    assert started == [(1 << 20, ["train.py"])]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train.py"], "expected --memory=SIZE, received no --memory."),
        (["--memroy=1MiB"], "Unknown command line flag 'memroy'. Did you mean: memory ?"),
        (["--memory=1MiB"], "script: expected a Python file to run, received nothing. Name it after `--`."),
        (
            ["--memory=1MiB", "--", "missing.py"],
            "script: expected a Python file to run, received 'missing.py', which is no file. Name it after `--`.",
        ),
        (
            ["--memory=300", "train.py"],
            'expected a size such as "2GiB" or "300MB", received \'300\'. Write a number and a unit: '
            "B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).",
        ),
        (
            ["--memory=1KiB", __file__],
            "memory: expected at least 1048576 bytes, received 1024. The limit is set in whole MiB.",
        ),
    ],
)
def test_run_refuses(argv, message, capsys):
    assert graphswap_cli.main(["run", *argv]) == 2
    assert capsys.readouterr().err == f"graphswap run: {message}\nFor example: {RUN}\n"
