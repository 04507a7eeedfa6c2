"""The commands on saved steps: explain, plan, simulate, diff, sweep, calibrate, rewrite, export."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags

from graphswap import devices, page, perfetto, plan_file
from graphswap.cost_model import CostModel, DeviceSpec
from graphswap.options import Options, format_bytes, parse_bytes
from graphswap.picture import CurvePoint
from graphswap.plan import Plan, PlanError
from graphswap.report import picture
from graphswap.simulator import NoRoom, simulate
from graphswap.strategies import STRATEGIES, budgets
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.strategies.solver import SolverError

if TYPE_CHECKING:
    from graphswap import offline

_EXPLAINING = 10.0
"""Seconds that `explain` looks for a free budget."""
_MOST_NODES = 30_000
"""Of a step whose budgets `explain` looks for unless told to: with four times as many it takes minutes."""
_SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of the plain peak: the budgets of a curve unless others are named."""


class CommandError(Exception):
    """Why a command could not do its work, in one line for people."""


class HelpAsked(Exception):
    """The first argument is `--help`.

    Attributes:
        values: The command's flags.
    """

    def __init__(self, values: flags.FlagValues):
        super().__init__()
        self.values = values


def explain(argv: Sequence[str]) -> int:
    """Where the memory of a step goes, a saved one's or that of a plan file."""
    form, values = _Format(), flags.FlagValues()
    source = None if argv[1:] and not argv[1].startswith("-") else _Source()
    device = _device_flag(values)
    has_budgets = flags.DEFINE_bool(
        "budgets", None, "Whether to look for the smallest and the free budget.", flag_values=values
    )
    if source is None:
        (path,) = _parse(argv, values, form, takes="a plan file")
        made, spec, recorded = _read(path), _device(device.value), None
        graph, cost_model = made.graph, CostModel(spec) if spec else made.cost_model
    else:
        _parse(argv, values, source, form)
        step, spec = source.step(), _device(device.value)
        from graphswap import offline

        with _refusals():
            # First: what measuring the costs leaves on the device would count.
            recorded, notes = (None, []) if spec else offline.Planner(step, Options("auto"), _say).recorded()
        _tell(notes)
        graph, cost_model = step.graph, _cost_model(step, spec)
    from graphswap import explanation

    with _refusals():
        found = explanation.explain(graph, cost_model, recorded)
        if has_budgets.value or (has_budgets.value is None and len(graph.nodes) <= _MOST_NODES):
            found = explanation.with_budgets(found, cost_model, _EXPLAINING)
    form.show(found.fields(), str(found))
    return 0


def plan(argv: Sequence[str]) -> int:
    """Plans a step and writes the plan."""
    source, form, values = _Source(), _Format(), flags.FlagValues()
    device = _device_flag(values)
    asked = _planning_flags(values)
    output = flags.DEFINE_string("output", None, "File for the plan.", flag_values=values)
    shown = flags.DEFINE_string("html", None, "File for a page that shows it.", flag_values=values)
    trace = flags.DEFINE_string("trace", None, "File for a trace that Perfetto opens.", flag_values=values)
    _parse(argv, values, source, form)
    for path in (output.value, shown.value, trace.value):
        _check_file(path)
    _check_page(shown.value)
    options = asked()
    step = source.step()
    from graphswap import offline

    with _refusals():
        made = _planned(step, options, _device(device.value))
    judged = made.judge()
    if output.value:
        _write(output.value, made.to_json())
    if shown.value or trace.value:
        with _refusals():
            shows = picture(made, _bounds(made, judged) if shown.value else ())
            if not device.value:
                recorded, notes = offline.Planner(step, options, _say).recorded(made.plan)
                _tell(notes)
                shows = dataclasses.replace(shows, measured=recorded.levels if recorded else ())
        if shown.value:
            _write(shown.value, page.html(shows))
        if trace.value:
            _write(trace.value, perfetto.trace(shows))
    form.show({"plan": json.loads(made.plan.to_json()), **judged.fields()}, f"{made.plan}\n{_figures(judged)}")
    return 0


def simulate_plan(argv: Sequence[str]) -> int:
    """Judges a plan on a device."""
    form, values = _Format(), flags.FlagValues()
    device = _device_flag(values)
    (path,) = _parse(argv, values, form, takes="a plan file")
    judged = _judged(path, _read(path), _device(device.value))
    form.show(judged.fields(), _figures(judged))
    return 0


def diff(argv: Sequence[str]) -> int:
    """Compares two plans."""
    form, values = _Format(), flags.FlagValues()
    first, second = _parse(argv, values, form, takes="two plan files", count=2)
    sides = [_read(path) for path in (first, second)]
    figures = [_judged(path, side).fields() for path, side in zip((first, second), sides, strict=True)]
    decisions = [{str(_decided(decision)) for decision in side.plan.decisions} for side in sides]
    only = [sorted(decisions[0] - decisions[1]), sorted(decisions[1] - decisions[0])]
    fields = {
        "same_graph": sides[0].graph.fingerprint == sides[1].graph.fingerprint,
        "same_order": sides[0].plan.order == sides[1].plan.order,
        "first": figures[0],
        "second": figures[1],
        "only_in_first": only[0],
        "only_in_second": only[1],
        "in_both": len(decisions[0] & decisions[1]),
    }
    lines = [f"{'':24}{'first':>14}{'second':>14}"]
    for name, one in figures[0].items():
        lines.append(f"{name:24}{plan_file.number(name, one):>14}{plan_file.number(name, figures[1][name]):>14}")
    lines.append("the graph is the same" if fields["same_graph"] else "the plans are for different graphs")
    lines.append("the order is the same" if fields["same_order"] else "the order differs")
    lines.append(f"{fields['in_both']} decisions are in both")
    lines += [f"- {text}" for text in only[0]] + [f"+ {text}" for text in only[1]]
    form.show(fields, "\n".join(lines))
    return 0


def sweep(argv: Sequence[str]) -> int:
    """Draws the curve of budget and time with its bound."""
    source, form, values = _Source(), _Format(), flags.FlagValues()
    device = _device_flag(values)
    asked = _planning_flags(values, has_budget=False)
    named = flags.DEFINE_list("budgets", [], "Sizes, or shares of the plain peak such as 50%.", flag_values=values)
    shown = flags.DEFINE_string("html", None, "File for a page that shows it.", flag_values=values)
    _parse(argv, values, source, form)
    _check_file(shown.value)
    _check_page(shown.value)
    options = asked()
    step = source.step()
    cost_model = _cost_model(step, _device(device.value), options)
    made = plan_file.PlanFile(Plan(), step.graph, cost_model)
    judged = made.judge()
    with _refusals():
        points = _curve(made, _budgets(judged, named.value), options.planning_seconds, str(options.strategy))
    if shown.value:
        _write(shown.value, page.html(picture(made, points)))
    plain_seconds = judged.plain.seconds * judged.time_scale
    rows = [f"{'budget':>12}{'bound':>12}{'planned':>12}{'slower':>10}"]
    for point in points:
        slower = (point.planned_seconds or 0.0) / plain_seconds - 1
        rows.append(
            f"{format_bytes(point.memory_budget):>12}"
            f"{'-' if point.bound_seconds is None else f'{point.bound_seconds:.4f} s':>12}"
            f"{'no plan' if point.planned_seconds is None else f'{point.planned_seconds:.4f} s':>12}"
            f"{'' if point.planned_seconds is None else f'{slower:.1%}':>10}"
        )
    names = ("memory_budget", "bound_seconds", "planned_seconds")
    fields = [{name: getattr(point, name) for name in names} for point in points]
    form.show({"plain_seconds": plain_seconds, "points": fields}, "\n".join(rows))
    return 0


def calibrate(argv: Sequence[str]) -> int:
    """Measures this machine into a device file."""
    form, values = _Format(), flags.FlagValues()
    output = flags.DEFINE_string("output", None, "File for the device.", flag_values=values)
    _parse(argv, values, form)
    _check_file(output.value)
    from graphswap import planning, tiers

    device = planning.Planner(Options("auto"), tiers.Tiers()).device()
    fields = plan_file.device_fields(device)
    if output.value:
        _write(output.value, json.dumps(fields, indent=1))
    memory = "no limit" if device.memory_bytes is None else format_bytes(device.memory_bytes)
    lines = [f"{device.name}: memory {memory}"]
    for tier, link in device.links.items():
        speeds = (format_bytes(speed) for speed in (link.out_bytes_per_second, link.in_bytes_per_second))
        lines.append(f"  {tier:6}{'{}/s out, {}/s in'.format(*speeds)}")
    form.show(fields, "\n".join(lines))
    return 0


def rewrite(argv: Sequence[str]) -> int:
    """Writes a SavedModel whose step obeys a budget."""
    source, form, values = _Source(has_models=False), _Format(), flags.FlagValues()
    asked = _planning_flags(values)
    output = flags.DEFINE_string("output", None, "Directory for the new SavedModel.", flag_values=values)
    _parse(argv, values, source, form)
    if output.value is None:
        raise app.UsageError("expected --output=DIR, received no --output.")
    from graphswap import offline, saved_model

    options = asked()
    with _refusals():
        saved_model.check_output(pathlib.Path(output.value))
        function = source.function()
        if function.update() is None:
            raise CommandError(
                f"expected a function that updates variables, received '{function.name}', which updates none. "
                "Name the training step: --function=NAME."
            )
        step = offline.from_saved_model(function, source.batch_size)
        planner = offline.Planner(step, options, _say)
        planned, rewritten, measured = planner.fitted()
        saved_model.write(function, rewritten, output.value)
    _tell(planned.notes)
    judged = plan_file.PlanFile(planned.plan, planned.graph, planned.cost_model).judge()
    lines = [_figures(judged), f"wrote   {output.value}"]
    if measured is not None:
        lines.insert(1, f"peak    {format_bytes(measured)} measured over some steps")
    form.show({"output": output.value, **judged.fields(), "measured_peak_bytes": measured}, "\n".join(lines))
    return 0


def export(argv: Sequence[str]) -> int:
    """Exports a forward function as ONNX, or a training step as StableHLO."""
    source, values = _Source(function=None), flags.FlagValues()
    kind = flags.DEFINE_enum("format", "onnx", list(_EXPORTED), "What to export to.", flag_values=values)
    output = flags.DEFINE_string("output", None, "File (onnx) or directory (stablehlo) to write.", flag_values=values)
    obeyed = flags.DEFINE_string("plan", None, "A plan file to obey (stablehlo).", flag_values=values)
    target = flags.DEFINE_string(
        "target", None, "XLA's description of a GPU to compile for (stablehlo).", flag_values=values
    )
    device = _device_flag(values)
    asked = _planning_flags(values, default=None)
    _parse(argv, values, source)
    source.default = _EXPORTED[kind.value]
    if output.value is None:
        raise app.UsageError("expected --output=PATH, received no --output.")
    if kind.value == "onnx":
        return _export_onnx(source, output.value)
    if obeyed.value and values["memory_budget"].value:
        raise app.UsageError("expected --plan=FILE or --memory_budget=SIZE, received both.")
    options = asked() if values["memory_budget"].value else None
    return _export_stablehlo(source, output.value, obeyed.value, options, device.value, target.value)


_EXPORTED = {"onnx": "serving_default", "stablehlo": "step"}
"""What `export` writes, and the function that it takes unless another one is named."""


def _export_onnx(source: _Source, output: str) -> int:
    from graphswap import onnx_export

    if source.saved_model is None:
        raise app.UsageError("expected --saved_model=DIR for ONNX, received --model.")
    try:
        print(onnx_export.export(source.saved_model, output, source.name))
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    return 0


def _export_stablehlo(
    source: _Source, output: str, obeyed: str | None, options: Options | None, device: str, target: str | None
) -> int:
    # Only compilers are needed: JAX would else take hold of the devices that are here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from graphswap import artefact, pjrt

    spec, compiled = _device(device), None
    with _refusals():
        pjrt.check_version()
        artefact.check_output(pathlib.Path(output))
        description = None if target is None else _target(target)
        step = source.step()
        if options is not None and description is not None:
            made, exported, compiled, peak = _fitted(step, options, spec, description)
        else:
            made = _obeyed(step, obeyed, spec) if options is None else _planned(step, options, spec)
            exported = _stablehlo(step, made.plan)
            peak = _peak(made)
            if description is not None:
                compiled = _compiled(exported, description)
        artefact.write(exported, output)
    _hush()
    print(f"{output}: {exported.manifest}")
    if compiled is not None:
        print(f"predicted   {format_bytes(peak)} on the device\n{compiled}")
    return 0


def _fitted(step: offline.Step, options: Options, device: DeviceSpec | None, target: str) -> tuple[Any, Any, Any, int]:
    """A plan, its step, what a compiler makes of it, which keeps the budget, too, and the peak that was predicted."""
    from graphswap import fusion, xla

    if not isinstance(options.memory_budget, int):
        made = _planned(step, options, device)
        exported = _stablehlo(step, made.plan)
        return made, exported, _compiled(exported, target), _peak(made)
    cost_model, view, tried = _cost_model(step, device, options), fusion.fused(step.graph), []

    def needs(plan: Plan) -> int:
        exported = _stablehlo(step, fusion.expanded(plan, step.graph))
        tried.append((plan, exported, _compiled(exported, target)))
        return tried[-1][2].memory.device

    strategy = _strategy(options, options.planning_seconds / 3)
    plan = xla.fitted(strategy, view, cost_model, options.memory_budget, needs)
    exported, compiled = next((exported, compiled) for planned, exported, compiled in tried if planned is plan)
    made = plan_file.PlanFile(fusion.expanded(plan, step.graph), step.graph, cost_model)
    return made, exported, compiled, simulate(view, plan, cost_model).peak_bytes


def _peak(made: plan_file.PlanFile) -> int:
    """Bytes, as TensorFlow would need them."""
    judged = made.judge()
    return judged.plain.peak_bytes if made.plan.is_empty else judged.planned.allocated_peak_bytes


def _obeyed(step: offline.Step, path: str | None, device: DeviceSpec | None) -> plan_file.PlanFile:
    """The plan in a file, or none, with its costs."""
    plan, cost_model = (Plan(), None) if path is None else plan_file.given(path, step.graph)
    return plan_file.PlanFile(plan, step.graph, cost_model or CostModel(device or DeviceSpec()))


def _stablehlo(step: offline.Step, plan: Plan) -> Any:
    from graphswap import stablehlo_export

    _say("export")
    return stablehlo_export.export(step.func_graph, step.graph, plan)


def _compiled(exported: Any, target: str) -> Any:
    from graphswap import pjrt

    _say("compile")
    return pjrt.compile_for(exported, target)


def _target(path: str) -> str:
    """XLA's description of a GPU."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CommandError(
            f"--target: expected the text of XLA's GpuTargetConfigProto, received '{path}', which can't be read: "
            f"{reason}."
        ) from error


# --- flags --------------------------------------------------------------------------------------------------------


class _Source:
    """The flags that name a step."""

    def __init__(self, has_models: bool = True, function: str | None = "step"):
        self.default = function or ""
        self.values = flags.FlagValues()
        self._saved_model = flags.DEFINE_string(
            "saved_model", None, "Directory of a SavedModel.", flag_values=self.values
        )
        self._function = flags.DEFINE_string("function", function, "Its function to take.", flag_values=self.values)
        self._batch_size = flags.DEFINE_integer(
            "batch_size", None, "For first dimensions that are left open.", 1, flag_values=self.values
        )
        self._model = None
        if has_models:
            self._model = flags.DEFINE_string("model", None, "A .keras file, in its place.", flag_values=self.values)

    def check(self) -> None:
        """Raises UsageError unless one step is named."""
        model, has_models = self._model_file, self._model is not None
        if (self._saved_model.value is None) == (model is None):
            either = "--saved_model=DIR or --model=FILE.keras" if has_models else "--saved_model=DIR"
            received = "both" if model is not None else "neither" if has_models else "no --saved_model"
            raise app.UsageError(f"expected {either}, received {received}.")
        if model is not None and self._batch_size.value is None:
            raise app.UsageError("expected --batch_size=N beside --model, received none.")

    @property
    def _model_file(self) -> str | None:
        return None if self._model is None else self._model.value

    @property
    def saved_model(self) -> str | None:
        return self._saved_model.value

    @property
    def name(self) -> str:
        return self._function.value or self.default

    @property
    def batch_size(self) -> int | None:
        return self._batch_size.value

    def function(self) -> Any:
        """The function of the SavedModel."""
        from graphswap import saved_model

        _say("load")
        return saved_model.load(str(self.saved_model), self.name)

    def step(self) -> offline.Step:
        """The step, traced."""
        from graphswap import offline

        with _refusals():
            if self._model_file is not None:
                _say("load")
                return offline.from_keras(self._model_file, self._batch_size.value or 0)
            return offline.from_saved_model(self.function(), self.batch_size)


class _Format:
    """The flag that says how results are written."""

    def __init__(self) -> None:
        self.values = flags.FlagValues()
        self._kind = flags.DEFINE_enum("format", "text", ["text", "json"], "For people or programs.", self.values)

    def check(self) -> None:
        """Nothing can be wrong by itself."""

    def show(self, fields: Mapping[str, Any], text: str) -> None:
        """Prints one or the other."""
        _hush()
        print(json.dumps(fields) if self._kind.value == "json" else text)


def _parse(
    argv: Sequence[str], values: flags.FlagValues, *groups: Any, takes: str = "", count: int = 1
) -> Sequence[str]:
    """Parses flags. Returns the other arguments.

    Raises:
        UsageError: If there are not as many as the command takes.
        HelpAsked, flags.Error: As `parsed` does.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow, loaded later, would talk between the lines
    for group in groups:
        values.append_flag_values(group.values)
    rest = parsed(values, argv)
    for group in groups:
        group.values.mark_as_parsed()
        group.check()
    if len(rest) != (count if takes else 0):
        raise app.UsageError(f"expected {takes or 'flags'}, received {', '.join(rest) or 'none'}.")
    return rest


def parsed(values: flags.FlagValues, argv: Sequence[str]) -> Sequence[str]:
    """Parses flags, after the name of the program. Returns the other arguments.

    Raises:
        HelpAsked: If the first one asks for help.
        flags.Error: If a flag is unknown or its value is wrong.
    """
    if argv[1:2] in (["-h"], ["--help"]):
        raise HelpAsked(values)
    return values(argv)[1:]


def _device_flag(values: flags.FlagValues) -> Any:
    known = ", ".join(devices.DEVICES)
    return flags.DEFINE_string("device", "", f"{known}, or a file of `graphswap calibrate`.", flag_values=values)


def _device(name: str) -> DeviceSpec | None:
    """The device that a flag names; None for this machine's."""
    if not name:
        return None
    if name in devices.DEVICES:
        return devices.DEVICES[name]
    try:
        return plan_file.device_from_fields(json.loads(pathlib.Path(name).read_text()))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removesuffix(".")
        raise app.UsageError(
            f"--device: expected one of {', '.join(devices.DEVICES)} or a file of `graphswap calibrate`, "
            f"received '{name}': {reason}."
        ) from error


def _planning_flags(
    values: flags.FlagValues, has_budget: bool = True, default: str | None = "auto"
) -> Callable[[], Options]:
    budget = None
    if has_budget:
        budget = flags.DEFINE_string(
            "memory_budget", default, "A size such as 2GiB; auto, free or min.", flag_values=values
        )
    strategy = flags.DEFINE_string(
        "strategy", str(Options.strategy), f"One of {', '.join(STRATEGIES)}.", flag_values=values
    )
    seconds = flags.DEFINE_float("planning_seconds", 30.0, "Seconds that planning may take.", flag_values=values)

    def options() -> Options:
        try:
            return Options(
                "auto" if budget is None else str(budget.value),
                strategy=strategy.value,
                swap_to="host",
                planning_seconds=seconds.value,
            )
        except (TypeError, ValueError) as error:
            raise app.UsageError(str(error)) from error

    return options


def _check_file(path: str | None) -> None:
    if not path:
        return
    folder = pathlib.Path(path).parent
    if pathlib.Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise CommandError(
            f"expected a file in a folder that can be written to, received '{path}'. Name another place."
        )


def _check_page(path: str | None) -> None:
    if path:
        try:
            page.check()
        except ImportError as error:
            raise CommandError(str(error)) from error


# --- work ---------------------------------------------------------------------------------------------------------


class _refusals:  # noqa: N801 (used as a function)
    """Turns what the library refuses into one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        _hush()
        # SavedModelError, InfeasibleBudgetError, UnsupportedGraphError; an extra that is missing
        if isinstance(error, (ValueError, ImportError, NoRoom, SolverError)):
            raise CommandError(" ".join(str(error).split())) from error
        tensorflow: Any = sys.modules.get("tensorflow")
        if tensorflow and isinstance(error, tensorflow.errors.ResourceExhaustedError):
            raise CommandError(
                f"this device has too little memory for the step's arguments: {str(error).splitlines()[0]} "
                "Reduce --batch_size, or name another --device."
            ) from error


def _say(phase: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[Kgraphswap: {phase} ...", end="", file=sys.stderr, flush=True)


def _tell(notes: Sequence[str]) -> None:
    """Says what the user should know besides the result."""
    _hush()
    for note in notes:
        print(f"graphswap: note: {note}", file=sys.stderr)


def _hush() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _cost_model(step: offline.Step, device: DeviceSpec | None, options: Options | None = None) -> CostModel:
    """Costs by the data sheet of a named device; measured for this machine."""
    if device is not None:
        return CostModel(device)
    from graphswap import offline

    with _refusals():
        cost_model, notes = offline.Planner(step, options or Options("auto", swap_to="host"), _say).cost_model()
    _tell(notes)
    return cost_model


def _planned(step: offline.Step, options: Options, device: DeviceSpec | None) -> plan_file.PlanFile:
    from graphswap import explanation

    if device is None:
        from graphswap import offline

        planned = offline.Planner(step, options, _say).plan()
        _tell(planned.notes)
        plan, cost_model = planned.plan, planned.cost_model
    else:
        budget, cost_model = options.memory_budget, CostModel(device)
        strategy = _strategy(options, options.planning_seconds)
        _say("plan")
        if budget == "free":
            plan = budgets.free(strategy, step.graph, cost_model, options.planning_seconds).plan
        elif budget == "min":
            plan = budgets.smallest(strategy, step.graph, cost_model)
        else:
            if budget == "auto" and device.memory_bytes is None:
                raise CommandError(
                    f"expected a --memory_budget such as 16GiB, received none, and device '{device.name}' does not "
                    "say how much memory it has."
                )
            plan = strategy.plan(step.graph, cost_model, device.memory_bytes if budget == "auto" else int(budget))
    plan = plan.replace(declined=explanation.declined(step.graph, plan, cost_model))
    return plan_file.PlanFile(plan, step.graph, cost_model)


def _strategy(options: Options, seconds: float) -> Any:
    """The strategy that the options name, with so much time for a plan."""
    strategy: Any = STRATEGIES[str(options.strategy)]
    return (
        dataclasses.replace(strategy, planning_seconds=seconds) if hasattr(strategy, "planning_seconds") else strategy
    )


def _budgets(judged: plan_file.Judgement, named: Sequence[str]) -> list[int]:
    """The budgets of a curve in bytes, rising."""
    peak = judged.plain.peak_bytes
    if not named:
        return sorted(int(share * peak) for share in _SHARES)
    found = []
    for text in named:
        try:
            found.append(int(float(text[:-1]) / 100 * peak) if text.endswith("%") else parse_bytes(text))
        except ValueError as error:
            raise app.UsageError(f"--budgets: {error}") from error
    return sorted(found)


def _curve(
    made: plan_file.PlanFile, sizes: Sequence[int], seconds: float, strategy: str = "greedy"
) -> tuple[CurvePoint, ...]:
    """The bound at every budget; and a plan, if there are `seconds` to look for it."""
    profile = made.cost_model.profile
    time_scale = 1.0 if profile is None else profile.time_scale
    envelope = budgets.envelope(made.graph, made.cost_model)
    points = []
    for size in sizes:
        planned = None
        if seconds:
            _say(f"plan for {format_bytes(size)}")
            try:
                plan = _strategy(Options("auto", strategy), seconds).plan(made.graph, made.cost_model, size)
                planned = simulate(made.graph, plan, made.cost_model).seconds * time_scale
            except InfeasibleBudgetError:
                planned = None
        points.append(CurvePoint(size, envelope.seconds(size) * time_scale, planned))
    return tuple(points)


def _bounds(made: plan_file.PlanFile, judged: plan_file.Judgement) -> tuple[CurvePoint, ...]:
    """The bound at every budget, and the plan at its own."""
    points = (dataclasses.replace(point, was_planned=False) for point in _curve(made, _budgets(judged, ()), 0.0))
    fields, budget = judged.fields(), made.plan.memory_budget
    own = () if budget is None else (CurvePoint(budget, fields["bound_seconds"], fields["predicted_seconds"]),)
    return (*points, *own)


def _figures(judged: plan_file.Judgement) -> str:
    fields = judged.fields()
    bound = fields["bound_seconds"]

    def number(name: str) -> str:
        return plan_file.number(name, fields[name])

    lines = [
        f"peak    plain {number('plain_peak_bytes')}, planned {number('predicted_peak_bytes')}",
        f"step    plain {number('plain_seconds')}, planned {number('predicted_seconds')}",
        f"moved   {number('swapped_bytes')} out, {number('recomputed_seconds')} repeated",
    ]
    if bound is not None:
        lines.append(f"bound   no plan of its class takes less than {bound:.4f} s in this budget")
    return "\n".join(lines)


def _decided(decision: Any) -> str:
    """A decision in a line, without its reason."""
    return str(Plan(decisions=(dataclasses.replace(decision, reason=""),))).splitlines()[1].strip()


def _read(path: str) -> plan_file.PlanFile:
    try:
        return plan_file.read(path)
    except PlanError as error:
        raise CommandError(str(error)) from error


def _judged(path: str, made: plan_file.PlanFile, device: DeviceSpec | None = None) -> plan_file.Judgement:
    try:
        return made.judge(device)
    except NoRoom as error:
        raise CommandError(f"'{path}': {error}. The plan does not fit this device: plan for it.") from error


def _write(path: str, text: str) -> None:
    try:
        plan_file.write(path, text)
    except OSError as error:
        raise CommandError(
            f"writing '{path}' failed: {error.strerror}. Nothing was left there. Free space, or name another place."
        ) from error
