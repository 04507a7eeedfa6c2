"""The command line: `graphswap COMMAND ...`. `graphswap --help` lists the commands."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from graphswap import emulate, options
from graphswap.tools import commands


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: What it does, in one line.
        example: A call to copy.
        main: Runs it on its arguments, the name of the program first, and returns the exit status.
    """

    summary: str
    example: str
    main: Callable[[Sequence[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command's name and its arguments; by default those of the process.

    Returns:
        The exit status: 2 if the command is unknown or its arguments are wrong, 1 if it could not do its work, else
        the command's own.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "help", "-h", "--help"):
        print(_usage(COMMANDS), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"Did you mean '{close[0]}'?" if close else "`graphswap --help` lists them."
        return _refuse("graphswap", f"expected a command out of {', '.join(COMMANDS)}, received '{name}'. {advice}")
    try:
        return COMMANDS[name].main([f"graphswap {name}", *arguments]) or 0
    except commands.HelpAsked as asked:
        print("\n".join([_usage({name: COMMANDS[name]}), "", *_flags(asked.values)]))
        return 0
    except (flags.Error, app.UsageError) as error:
        return _refuse(f"graphswap {name}", f"{error}\nFor example: {COMMANDS[name].example}")
    except commands.CommandError as error:
        print(f"graphswap {name}: {error}", file=sys.stderr)
        return 1


def _run(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    values.set_gnu_getopt(False)  # flags after the script are the script's
    memory = flags.DEFINE_string("memory", None, "Memory of the device.", flag_values=values)
    script = commands.parsed(values, argv)
    if memory.value is None:
        raise app.UsageError("expected --memory=SIZE, received no --memory.")
    try:
        return emulate.run_script(options.parse_bytes(memory.value), script)
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _demo(argv: Sequence[str]) -> int | None:
    from graphswap.tools import demo

    return demo.main(argv)


def _launch(argv: Sequence[str]) -> int:
    from graphswap.tools import launch

    return launch.main(argv)


COMMANDS = {
    "explain": Command(
        "Shows where the memory of a saved training step goes, and what could go.",
        "graphswap explain --saved_model=DIR --function=step",
        commands.explain,
    ),
    "plan": Command(
        "Plans a saved training step, and writes the plan and a page that shows it.",
        "graphswap plan --saved_model=DIR --memory_budget=2GiB --output=plan.json --html=plan.html",
        commands.plan,
    ),
    "simulate": Command(
        "Judges a plan, on the device it was made for or another one.",
        "graphswap simulate plan.json --device=h200",
        commands.simulate_plan,
    ),
    "diff": Command(
        "Compares two plans.",
        "graphswap diff first.json second.json",
        commands.diff,
    ),
    "sweep": Command(
        "Shows how long the step takes at which budget, and the bound below which no plan is.",
        "graphswap sweep --saved_model=DIR --budgets=70%,50%,30% --html=curve.html",
        commands.sweep,
    ),
    "calibrate": Command(
        "Measures this machine into a device file.",
        "graphswap calibrate --output=device.json",
        commands.calibrate,
    ),
    "rewrite": Command(
        "Writes a SavedModel whose training step keeps a budget, for TensorFlow alone.",
        "graphswap rewrite --saved_model=IN --memory_budget=2GiB --output=OUT",
        commands.rewrite,
    ),
    "export": Command(
        "Exports a forward function as ONNX, or a training step as StableHLO for PJRT.",
        "graphswap export --saved_model=DIR --format=onnx --output=model.onnx",
        commands.export,
    ),
    "run": Command(
        "Runs a Python script on an emulated accelerator, a CPU device with little memory.",
        "graphswap run --memory=300MiB -- train.py --epochs=2",
        _run,
    ),
    "launch": Command(
        "Runs a Python script as a cluster of workers on this machine, to try out tf.distribute.",
        "graphswap launch --workers=2 --memory=300MiB -- train.py --epochs=2",
        _launch,
    ),
    "demo": Command(
        "Trains a model in less memory than it needs, and shows that the losses are the same.",
        "graphswap demo",
        _demo,
    ),
}


def _usage(commands: dict[str, Command]) -> str:
    lines = ["usage: graphswap COMMAND [FLAGS]"]
    for name, command in commands.items():
        lines += ["", f"  {name:10}{command.summary}", f"  {'':10}$ {command.example}"]
    return "\n".join(lines)


def _flags(values: flags.FlagValues) -> list[str]:
    lines = []
    for name in values:
        flag = values[name]
        title = f"--[no]{name}" if flag.boolean else f"--{name}"
        default = f" Default: {flag.default}." if flag.default or flag.default == 0 else ""
        lines.append(f"  {title:22}{flag.help}{default}")
    return lines


def _refuse(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 2
