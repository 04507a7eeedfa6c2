"""html(picture) -> str: what one step does, as one HTML page that needs nothing but a browser.

Bokeh draws it, which `pip install graphswap[report]` brings. Its code travels inside the page, so nothing is loaded.
The page follows the browser's light or dark mode.
"""

from __future__ import annotations

import dataclasses
import html as markup
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphswap import ir, liveness
from graphswap.options import format_bytes
from graphswap.picture import Picture, decided, moments
from graphswap.plan import Exchange, Place, Prefetch, Recompute, Shard, SideBySide, Swap, WriteBack
from graphswap.simulator import Timeline

_BUCKETS = 2000
"""Stretches of time of which a longer line keeps two points each: more than a screen has columns."""
_BARS = 1000
_ROWS = 500
_LETTERS = 120
"""Of a name: more than a screen has room for."""

_KINDS = {
    "run": "runs",
    "recompute": "runs again",
    "swap_out": "swap out",
    "swap_in": "swap in",
    "fetch": "fetch",
    "store": "store",
    "exchange": "exchange",
}
_LEGEND = {"recompute": "Nodes that run again", "side by side": "Nodes that run side by side"}
_COLOURS = {
    "plain": "#75869c",
    "planned": "#3b82e0",
    "measured": "#2ba36a",
    "budget": "#e5534b",
    "bound": "#c0569a",
    "compute": "#75869c",
    "recompute": "#d67f14",
    "side by side": "#2ba36a",
    "swap out": "#9a6ae0",
    "swap in": "#16a0b0",
    "fetch": "#4f8f2f",
    "store": "#a8893c",
}


def html(picture: Picture) -> str:
    """The page as text.

    Raises:
        ImportError: If Bokeh is not installed.
    """
    check()
    from bokeh import embed, resources

    acts = _acts(picture)
    charts = {"step": _step_charts(picture, acts)}
    if picture.curve:
        charts["curve"] = _curve_chart(picture)
    items = [embed.json_item(chart, name) for name, chart in charts.items()]  # pyright: ignore[reportArgumentType]
    sections = [
        _facts(picture.facts),
        f"<h2>Memory over the step</h2>{_chart('step')}{_step_notes(picture, acts)}",
        f"<h2>Budget and time</h2>{_chart('curve')}{_curve_notes(picture)}" if picture.curve else "",
        "<h2>Decisions</h2>" + _decisions_table(acts),
        "<h2>Declined candidates</h2>" + _declined_table(picture),
    ]
    title = markup.escape(picture.title)
    code = resources.Resources(mode="inline", components=["bokeh"], log_level="warn").render_js()
    # In a script, "<" could end it.
    data = json.dumps(items, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n{code}\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main>\n<script>\nconst charts = {data};\n{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def check() -> None:
    """Raises ImportError if Bokeh is not installed."""
    try:
        import bokeh  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "bokeh":
            raise
        raise ImportError(
            "graphswap.page expected Bokeh, which draws the page, but it is not installed. "
            "Run `pip install graphswap[report]`."
        ) from error


@dataclasses.dataclass(frozen=True)
class _Act:
    """A decision, and when it is carried out.

    Attributes:
        decision: The decision.
        kind: In a word.
        value: What it is about.
        nbytes: Bytes that move or that are made again.
        what: What happens.
        spans: Lane, start and end of each of its bars, in unscaled seconds.
    """

    decision: Swap | Recompute | Prefetch | WriteBack | SideBySide
    kind: str
    value: str
    nbytes: int
    what: str
    spans: tuple[tuple[str, float, float], ...]


def _acts(picture: Picture) -> list[_Act]:
    """All decisions, the largest first."""
    graph, plan, timeline = picture.graph, picture.plan, picture.planned
    spans: dict[int, dict[str, tuple[float, float]]] = {id(decision): {} for decision in plan.decisions}
    for step, decision in zip(timeline.steps, decided(graph, plan, timeline), strict=True):
        if decision is not None:
            lane = "compute" if step.kind == "recompute" else _KINDS[step.kind]
            start, _ = spans[id(decision)].get(lane, (step.start, step.end))
            spans[id(decision)][lane] = start, step.end
    runs = {step.name: (step.start, step.end) for step in timeline.steps if step.kind == "run"} if plan.pairs else {}
    for pair in plan.pairs:
        (first_start, first_end), (second_start, second_end) = runs[pair.first], runs[pair.second]
        spans[id(pair)]["compute"] = min(first_start, second_start), max(first_end, second_end)
    acts = [
        _Act(decision, *_described(graph, decision), tuple((lane, *span) for lane, span in spans[id(decision)].items()))
        for decision in plan.decisions
        if not isinstance(decision, Place | Exchange | Shard)  # which are nodes
    ]
    return sorted(acts, key=lambda act: act.nbytes, reverse=True)


def _described(
    graph: ir.Graph, decision: Swap | Recompute | Prefetch | WriteBack | SideBySide
) -> tuple[str, str, int, str]:
    """Kind, value, bytes and what happens."""
    if isinstance(decision, Swap):
        what = (
            f"to the {decision.tier} after {_short(decision.out_after)}, gone before {_short(decision.freed_before)}; "
            f"back after {_short(decision.in_after)}, needed by {_short(decision.in_before)}"
        )
        return "swap", decision.value, graph.value(decision.value).nbytes, what
    if isinstance(decision, Recompute):
        nodes = [graph.by_name[name] for name in decision.nodes]
        value, others = decision.nodes[-1], len(nodes) - 1
        company = f", with {others} more nodes," if others > 1 else ", with one more node," if others else ""
        what = f"runs again{company} right before {_short(decision.before)}"
        return "recompute", value, sum(map(_own_bytes, nodes)), what
    if isinstance(decision, Prefetch):
        node = graph.by_name[decision.node]
        needed = "" if decision.before == decision.node else f", needed by {_short(decision.before)}"
        what = f"starts after {_short(decision.after)}{needed}"
        return "fetch", _variable(node), node.outputs[0].nbytes, what
    if isinstance(decision, WriteBack):
        node = graph.by_name[decision.node]
        gone = f"gone before {_short(decision.freed_before)}" if decision.freed_before else "there until the step's end"
        return "store", _variable(node), graph.value(node.inputs[0]).nbytes, gone
    return "side by side", decision.first, 0, f"runs at the same time as {_short(decision.second)}"


def _variable(node: ir.Node) -> str:
    """What a FETCH or STORE is about; on a parameter server, what is read there."""
    attrs = dict(node.attrs)
    return str(attrs.get("variable") or attrs.get("value") or node.inputs[0])


def _own_bytes(node: ir.Node) -> int:
    """Bytes of the outputs that have a buffer of their own."""
    sizes = enumerate(liveness.output_bytes(node))
    return sum(nbytes for index, nbytes in sizes if liveness.alias_of(node, index) is None)


class _Unit(NamedTuple):
    """What an axis counts in, and for which amounts."""

    name: str
    size: float
    least: float


_BYTES = (_Unit("GiB", 2**30, 2**30), _Unit("MiB", 2**20, 2**20), _Unit("KiB", 2**10, 2**10), _Unit("B", 1, 0))
_SECONDS = (_Unit("s", 1, 10), _Unit("ms", 1e-3, 1e-3), _Unit("µs", 1e-6, 0))


def _unit(units: Iterable[_Unit], most: float) -> _Unit:
    return next(unit for unit in units if most >= unit.least)


@dataclasses.dataclass(frozen=True)
class _Line:
    """Bytes in use from a time on, until the next one; and the node that runs then, if it is known."""

    times: np.ndarray
    nbytes: np.ndarray
    nodes: Sequence[str]
    kinds: Sequence[str]

    def columns(self, seconds: _Unit, size: _Unit) -> dict[str, Any]:
        return {
            "time": self.times / seconds.size,
            "memory": self.nbytes / size.size,
            "node": self.nodes,
            "kind": self.kinds,
        }


def _lines(picture: Picture) -> dict[str, _Line]:
    lines = {
        "plain": _simulated_line(picture.plain, picture.time_scale),
        "planned": _simulated_line(picture.planned, picture.time_scale),
    }
    if picture.measured:
        times, nbytes = map(np.array, zip(*picture.measured, strict=True))
        kept = _thinned(times, nbytes)
        lines["measured"] = _Line(times[kept], nbytes[kept], [""] * len(kept), [""] * len(kept))
    return lines


def _simulated_line(timeline: Timeline, scale: float) -> _Line:
    steps = [*timeline.steps, timeline.steps[-1]]
    times = np.array([*moments(timeline), timeline.seconds]) * scale
    nbytes = np.array([step.live_bytes for step in steps])
    kept = _thinned(times, nbytes)
    kinds = [_KINDS[steps[place].kind] for place in kept]
    return _Line(times[kept], nbytes[kept], [_short(steps[place].name) for place in kept], kinds)


def _thinned(times: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Which points to keep: of every stretch of time the highest, and the last, which holds on after it."""
    if len(times) <= 2 * _BUCKETS or not times[-1]:
        return np.arange(len(times))
    buckets = np.minimum(times / times[-1] * _BUCKETS, _BUCKETS - 1).astype(int)
    order = np.lexsort((nbytes, buckets))
    highest = order[np.flatnonzero(np.diff(buckets[order], append=_BUCKETS))]
    last = np.flatnonzero(np.diff(buckets, append=_BUCKETS))
    return np.union1d(highest, last)


def _step_charts(picture: Picture, acts: Sequence[_Act]) -> Any:
    """Memory over time and, below it with the same time axis, the decisions."""
    from bokeh import layouts, models

    lines = _lines(picture)
    whole = max(float(line.times[-1]) for line in lines.values())
    most = max(*(float(line.nbytes.max()) for line in lines.values()), float(picture.memory_budget or 0))
    seconds, size = _unit(_SECONDS, whole), _unit(_BYTES, most)
    end = whole / seconds.size
    time_axis = models.Range1d(start=0, end=end, bounds=(0, end))
    pointer = models.Span(dimension="height", line_color=_COLOURS["compute"], line_alpha=0.6)

    memory = _figure(
        height=380,
        x_range=time_axis,
        y_range=models.Range1d(start=0, end=1.06 * most / size.size),
        y_axis_label=f"bytes in use, {size.name}",
    )
    memory.xaxis.major_label_text_font_size = "0px"
    sources = {}
    for name, line in lines.items():
        source = sources[name] = models.ColumnDataSource(line.columns(seconds, size))
        label = name if name == "measured" else f"{name}, simulated"
        style = {"source": source, "color": _COLOURS[name], "legend_label": label}
        if name == "planned":
            memory.varea_step("time", 0, "memory", step_mode="after", alpha=0.12, **style)
        memory.step("time", "memory", mode="after", line_width=1.6, **style)
    if picture.memory_budget is not None:
        _add_budget(memory, [0, end], [picture.memory_budget / size.size] * 2, picture.memory_budget)
    _place_legend(memory)
    probe = memory.line([0, end], [0, 0], line_alpha=0)
    rows = "".join(_MEMORY_ROW.format(colour=_COLOURS[name], name=name) for name in sources)
    probe.data_source.data.update({name: [0, 0] for name in sources})
    memory.add_tools(
        models.CrosshairTool(dimensions="height", overlay=pointer, visible=False),
        models.HoverTool(
            renderers=[probe],
            visible=False,
            mode="vline",
            line_policy="none",
            show_arrow=False,
            tooltips=f"<b>$x{{0,0.00}} {seconds.name}</b>{rows}",
            formatters={
                f"@{name}": models.CustomJSHover(args={"line": source, "unit": size.name}, code=_LOOK_UP)
                for name, source in sources.items()
            },
        ),
    )
    lanes = _lanes(picture, acts[:_BARS], seconds, time_axis)
    lanes.add_tools(models.CrosshairTool(dimensions="height", overlay=pointer, visible=False))
    return layouts.column(memory, lanes, sizing_mode="stretch_width", spacing=0)


def _lanes(picture: Picture, acts: Sequence[_Act], seconds: _Unit, time_axis: Any) -> Any:
    """What runs and which copies are under way, over time."""
    from bokeh import models

    scale = picture.time_scale / seconds.size
    bars = [(act, *span) for act in acts for span in act.spans]
    copies = {lane for _, lane, _, _ in bars if lane != "compute"}
    lanes = [*sorted(copies), "compute"]
    chart = _figure(
        height=70 + 30 * len(lanes),
        x_range=time_axis,
        y_range=lanes,
        x_axis_label=f"time since the start of the step, {seconds.name}",
        toolbar_location=None,
    )
    chart.ygrid.visible = False
    chart.yaxis.major_tick_line_color = None
    blocks = _blocks(picture.planned) * scale
    chart.hbar(
        y=["compute"] * len(blocks),
        left=blocks[:, 0],
        right=blocks[:, 1],
        height=0.6,
        color=_COLOURS["compute"],
        alpha=0.5,
    )
    columns = {
        "lane": [lane for _, lane, _, _ in bars],
        "start": [start * scale for _, _, start, _ in bars],
        "end": [end * scale for _, _, _, end in bars],
        "colour": [_COLOURS[act.kind if lane == "compute" else lane] for act, lane, _, _ in bars],
        "kind": [act.kind if lane == "compute" else lane for act, lane, _, _ in bars],
        "value": [_short(act.value) for act, *_ in bars],
        "bytes": [_size(act.nbytes) for act, *_ in bars],
        "what": [act.what for act, *_ in bars],
        "reason": [_short(act.decision.reason) for act, *_ in bars],
    }
    drawn = chart.hbar(
        "lane",
        left="start",
        right="end",
        height=0.6,
        fill_color="colour",
        line_color="colour",
        fill_alpha=0.55,
        source=models.ColumnDataSource(columns),
    )
    unit = seconds.name
    tip = f"<b>@kind</b> @bytes<br>@value<br>@start{{0,0.00}} to @end{{0,0.00}} {unit}<br>@what<br><i>@reason</i>"
    chart.add_tools(
        models.HoverTool(renderers=[drawn], point_policy="follow_mouse", limit=3, show_arrow=False, tooltips=tip)
    )
    return chart


def _blocks(timeline: Timeline) -> np.ndarray:
    """Start and end of each stretch in which the device computes, without gaps too short to see."""
    spans = np.array([(step.start, step.end) for step in timeline.steps if step.kind in ("run", "recompute")])
    gaps = np.flatnonzero(spans[1:, 0] - spans[:-1, 1] > timeline.seconds / _BUCKETS)
    return np.column_stack([spans[np.concatenate([[0], gaps + 1]), 0], spans[np.concatenate([gaps, [-1]]), 1]])


def _curve_chart(picture: Picture) -> Any:
    """How long a step takes in which budget: at least, and as planned."""
    from bokeh import models

    points = sorted(picture.curve, key=lambda point: point.memory_budget)
    bounds = [(point.memory_budget, point.bound_seconds) for point in points if point.bound_seconds is not None]
    plans = [(point.memory_budget, point.planned_seconds) for point in points if point.planned_seconds is not None]
    plain = picture.plain.seconds * picture.time_scale
    times = [plain, *(time for _, time in (*bounds, *plans))]
    budgets = [point.memory_budget for point in points]
    if picture.memory_budget is not None:
        budgets.append(picture.memory_budget)
    seconds, size = _unit(_SECONDS, max(times)), _unit(_BYTES, max(budgets))
    left, right = _padded(min(budgets) / size.size, max(budgets) / size.size)
    low, high = _padded(min(times) / seconds.size, max(times) / seconds.size)
    chart = _figure(
        height=340,
        x_range=models.Range1d(start=left, end=right),
        y_range=models.Range1d(start=low, end=high),
        x_axis_label=f"memory budget, {size.name}",
        y_axis_label=f"time of a step, {seconds.name}",
    )

    def add_points(label: str, pairs: Sequence[tuple[int, float]], colour: str, marker_size: int) -> Any:
        columns = {"budget": [b / size.size for b, _ in pairs], "time": [t / seconds.size for _, t in pairs]}
        source = models.ColumnDataSource(columns)
        drawn = chart.scatter("budget", "time", source=source, size=marker_size, color=colour, legend_label=label)
        tip = f"<b>{label}</b><br>@budget{{0,0.00}} {size.name}, @time{{0,0.00}} {seconds.name}"
        chart.add_tools(models.HoverTool(renderers=[drawn], show_arrow=False, visible=False, tooltips=tip))
        return source

    style = {"color": _COLOURS["bound"], "legend_label": "no plan is faster (certified)"}
    bound = add_points(style["legend_label"], bounds, style["color"], 5)
    # A bound holds for all smaller budgets too. So between two points the lower one is certain, and no more.
    chart.step("budget", "time", source=bound, mode="before", line_width=1.6, **style)
    chart.varea_step("budget", low, "time", source=bound, step_mode="before", alpha=0.12, **style)
    add_points("planned, simulated", plans, _COLOURS["planned"], 9)
    level = [plain / seconds.size] * 2
    label = "plain, simulated"
    chart.line([left, right], level, color=_COLOURS["plain"], line_width=1.6, line_dash=[2, 3], legend_label=label)
    if picture.memory_budget is not None:
        _add_budget(chart, [picture.memory_budget / size.size] * 2, [low, high], picture.memory_budget)
    _place_legend(chart)
    return chart


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05 * high
    return max(0.0, low - margin), high + margin


def _figure(**options: Any) -> Any:
    """An empty chart. What is not data has its colour from the page's style."""
    from bokeh import models, plotting

    zoom = models.BoxZoomTool(dimensions="width")
    chart = plotting.figure(
        sizing_mode="stretch_width",
        tools=[zoom, models.PanTool(dimensions="width"), models.ResetTool()],
        active_drag=zoom,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=90,
        min_border_right=20,
        **options,
    )
    chart.toolbar.logo = None
    chart.toolbar.stylesheets = [".bk-divider { background-color: var(--rule); }"]
    chart.xgrid.visible = False
    for axis in chart.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "13px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
        if isinstance(axis, models.LinearAxis):
            axis.formatter = models.BasicTickFormatter(use_scientific=False)
    return chart


def _add_budget(chart: Any, x: Sequence[float], y: Sequence[float], memory_budget: int) -> None:
    label = f"budget, {format_bytes(memory_budget)}"
    chart.line(x, y, color=_COLOURS["budget"], line_width=1.6, line_dash=[7, 5], legend_label=label)


def _place_legend(chart: Any) -> None:
    """Puts the legend above the chart, where it hides nothing."""
    (legend,) = chart.legend
    chart.add_layout(legend, "above")
    legend.update(
        orientation="horizontal",
        location="left",
        click_policy="hide",
        background_fill_color=None,
        inactive_fill_color=None,
        border_line_color=None,
        label_text_font_size="13px",
        spacing=16,
        margin=0,
        stylesheets=[_LEGEND_STYLE],
    )


def _chart(name: str) -> str:
    return f'<div class="chart" id="{name}"></div>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th scope=row>{_text(name)}</th><td>{_text(fact)}</td></tr>" for name, fact in facts.items())
    return f'<table class="facts">{rows}</table>' if rows else ""


def _step_notes(picture: Picture, acts: Sequence[_Act]) -> str:
    lines = ["Plain and planned are simulated."]
    if picture.measured:
        lines.append("Measured was recorded while a step ran.")
    for name, timeline in (("plain", picture.plain), ("planned", picture.planned)):
        slack = ""
        if timeline.allocated_peak_bytes != timeline.peak_bytes:
            slack = f" ({format_bytes(timeline.allocated_peak_bytes)} with the slack of the allocator's chunks)"
        node = f"<code>{_text(_short(timeline.peak_step.name))}</code>"
        lines.append(f"The {name} peak is {format_bytes(timeline.peak_bytes)}{slack}, at {node}.")
    if max(len(picture.plain.steps), len(picture.planned.steps), len(picture.measured)) >= 2 * _BUCKETS:
        lines.append("Long lines are thinned out and keep the highest point of every stretch of time.")
    kinds = [kind for kind in ("recompute", "side by side") if any(act.kind == kind for act in acts)]
    bars = [f'<b style="color:{_COLOURS[kind]}">■</b> {_LEGEND[kind]}.' for kind in kinds]
    if len(acts) > _BARS:
        bars.append(f"The bars show the {_BARS:,} largest of {len(acts):,} decisions.")
    bars.append("Drag to zoom in; click a name above the chart to hide its line.")
    return f"<p class=note>{' '.join(lines)}</p><p class=note>{' '.join(bars)}</p>"


def _curve_notes(picture: Picture) -> str:
    notes = ["No plan of its class lies below the certified bound. The planned steps are simulated."]
    missing = (point for point in picture.curve if point.was_planned and point.planned_seconds is None)
    without = [format_bytes(point.memory_budget) for point in missing]
    if without:
        notes.append(f"No plan was found for {', '.join(without)}.")
    return f"<p class=note>{' '.join(notes)}</p>"


def _decisions_table(acts: Sequence[_Act]) -> str:
    rows = (
        (
            act.kind,
            f"<code>{_text(_short(act.value))}</code>",
            _size(act.nbytes),
            _text(act.what),
            _why(act.decision.reason),
        )
        for act in acts
    )
    return _table("decisions", ("decision", "value", "bytes", "what happens", "reason"), rows, len(acts))


def _declined_table(picture: Picture) -> str:
    sizes = [(picture.graph.value(declined.value).nbytes, declined) for declined in picture.plan.declined]
    sizes.sort(key=lambda entry: entry[0], reverse=True)
    rows = ((f"<code>{_text(_short(d.value))}</code>", _size(nbytes), _why(d.reason)) for nbytes, d in sizes)
    return _table("declined", ("value", "bytes", "reason"), rows, len(sizes))


def _table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]], count: int) -> str:
    """A table of ready cells, of which it takes as many as people read."""
    if not count:
        return "<p class=note>There are none.</p>"
    amount = f"All {count:,}" if count <= _ROWS else f"The {_ROWS:,} largest of {count:,}"
    head = "".join(f'<th scope=col class="{title.split()[0]}">{title}</th>' for title in heads)
    classes = [title.split()[0] for title in heads]
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in itertools.islice(rows, _ROWS)
    )
    return (
        f'<p class=note>{amount}, the largest first.</p><div class="scroll" tabindex=0>'
        f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _size(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "–"


def _why(reason: str) -> str:
    return _text(_short(reason)) or "–"


def _text(text: str) -> str:
    """The text as HTML. Long names may break after a slash."""
    return markup.escape(text).replace("/", "/<wbr>")


def _short(text: str) -> str:
    """The text, without its middle if it is long."""
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS // 2]}…{text[1 - _LETTERS // 2 :]}"


_MEMORY_ROW = '<div style="margin-top:4px"><b style="color:{colour}">{name}</b> @{name}{{custom}}</div>'

_LEGEND_STYLE = """
:host { max-width: 100%; }
.bk-grid { display: flex; flex-wrap: wrap; width: auto; }
.bk-item .bk-label { color: var(--text); }
.bk-item.bk-inactive { opacity: 0.4; }
"""

_LOOK_UP = """
const {time, memory, node, kind} = line.data
let low = 0, high = time.length
while (low < high) {
  const middle = (low + high) >> 1
  if (time[middle] <= special_vars.x) low = middle + 1
  else high = middle
}
if (low == 0 || low == time.length) return "–"
const amount = `${memory[low - 1].toPrecision(4)} ${unit}`
return node[low - 1] ? `${amount}, ${kind[low - 1]}: ${node[low - 1]}` : amount
"""

_SCRIPT = """
for (const chart of charts) Bokeh.embed.embed_item(chart)
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const {all_models} of Bokeh.documents)
    for (const model of all_models) if (/Axis|Grid/.test(model.type)) model.change.emit()
})
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2530; --soft: #5a6675; --rule: #dfe4ea; --ground: #ffffff; --card: #f6f8fa;
  --bk-axis-label-text-color: var(--soft); --bk-major-label-text-color: var(--soft);
  --bk-axis-line-color: var(--rule); --bk-major-tick-line-color: var(--rule); --bk-grid-line-color: var(--rule);
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --soft: #a0abba; --rule: #323a46; --ground: #14181e; --card: #1d232b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 28px 64px; }
h1 { margin: 0 0 14px; font-size: 26px; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; font-size: 18px; font-weight: 650; }
code { font: 0.92em ui-monospace, monospace; overflow-wrap: anywhere; }
.note { margin: 8px 0; color: var(--soft); font-size: 13.5px; max-width: 110ch; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.bk-Tooltip {
  max-width: 460px; padding: 8px 12px; overflow-wrap: anywhere;
  background: var(--card); color: var(--text); border: 1px solid var(--rule); font: 12px/1.5 system-ui, sans-serif;
}
.facts th { padding-right: 28px; }
.scroll { max-height: 420px; overflow: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll table { width: 100%; min-width: 760px; table-layout: fixed; border-collapse: separate; border-spacing: 0; }
.scroll th, .scroll td { padding: 6px 14px; overflow-wrap: anywhere; }
.scroll thead th { position: sticky; top: 0; background: var(--card); }
.scroll tr:last-child td { border-bottom: 0; }
.scroll .decision { width: 118px; }
.scroll .value, .scroll .reason { width: 25%; }
.scroll .bytes { width: 104px; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
#declined .value, #declined .reason { width: 50%; }
"""
