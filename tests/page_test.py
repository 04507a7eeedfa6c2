"""What the page says and holds, as text; `page_browser_test` opens it."""

import base64
import dataclasses
import gzip
import json
import re
import sys
import time

import exchange_test
import numpy as np
import pictures
import pytest
import testing

from graphswap import ir, page, rewrites
from graphswap.plan import Declined, Plan, SideBySide, Swap
from graphswap.simulator import Step, Timeline

MIB = pictures.MIB
HOSTILE = "</script><img src=x onerror=alert(1)>"


def charts(text):
    (found,) = re.findall(r"^const charts = (.*);$", text, re.MULTILINE)
    return json.loads(found)


def columns(data, name):
    """Returns all columns of that name, however deep."""
    if isinstance(data, dict):
        if data.get("type") == "map" and name in dict(data["entries"]):
            yield _values(dict(data["entries"])[name])
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from columns(part, name)


def _values(column):
    if isinstance(column, dict):
        raw = gzip.decompress(base64.b64decode(column["array"]["data"]))
        return np.frombuffer(raw, dtype=column["dtype"]).tolist()
    return column


def words(text):
    """Returns the page without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body.replace("<wbr>", "")))


def test_title_facts_decisions_and_declined_candidates_are_there():
    said = words(page.html(pictures.picture()))
    for part in (
        "a chain",
        "device none",
        "recompute f3 1.0MiB runs again right before b3 cheap to make",
        "swap f1 1.0MiB to the host after f2, gone before f3; back after b3, needed by b1 idle for long",
        "f2 1.0MiB its copy would come back too late",
        "All 2, the largest first.",
        "No plan was found for 5.0MiB.",
        f"The plain peak is {pictures.picture().plain.peak_bytes / MIB:.1f}MiB, at",
    ):
        assert part in said


def test_only_what_was_measured_is_called_measured():
    assert "easured" not in words(page.html(pictures.picture()))
    text = page.html(pictures.picture(measured=pictures.MEASURED))
    assert "Plain and planned are simulated. Measured was recorded while a step ran." in words(text)
    assert [2.0, 5.0, 3.0] in list(columns(charts(text), "memory"))


def test_every_decision_has_its_bars():
    data = charts(page.html(pictures.picture()))
    (lanes,), (values,), (reasons,) = (list(columns(data, name)) for name in ("lane", "value", "reason"))
    assert sorted(zip(lanes, values, reasons, strict=True)) == [
        ("compute", "f3", "cheap to make"),
        ("swap in", "f1", "idle for long"),
        ("swap out", "f1", "idle for long"),
    ]


def test_a_pair_is_a_bar_from_the_first_to_the_second():
    graph = ir.verify(
        ir.Graph("pair", tuple(ir.Node(name, "Foo", outputs=(ir.Value("float32", (256,)),)) for name in ("a", "b")))
    )
    drawn = pictures.simulated(graph, Plan(decisions=(SideBySide("a", "b"),)))
    text = page.html(pictures.picture(**drawn))
    assert list(columns(charts(text), "kind"))[-1] == ["side by side"]
    assert "side by side a – runs at the same time as b –" in words(text)


def test_copies_of_variables_have_bars_and_say_what_happens():
    text = page.html(pictures.picture(**pictures.simulated(pictures.FAR, pictures.COPIED)))
    assert "fetch w 1.0MiB starts after a" in words(text)
    assert "store gradient 1.0MiB there until the step's end" in words(text).replace("&#x27;", "'")
    assert ["fetch", "store"] in [sorted(kinds) for kinds in columns(charts(text), "lane")]


def test_a_plan_without_decisions_a_budget_or_a_curve():
    picture = pictures.picture(plan=Plan(), planned=pictures.picture().plain, memory_budget=None, curve=())
    said = words(page.html(picture))
    assert said.count("There are none.") == 2
    assert "Budget and time" not in said


def test_the_time_scale_stretches_the_timelines():
    usual, slow = (charts(page.html(pictures.picture(time_scale=scale))) for scale in (1.0, 2.0))
    assert max(next(columns(slow, "time"))) == pytest.approx(2 * max(next(columns(usual, "time"))))


def test_names_cannot_become_markup():
    graph = pictures.renamed(testing.chain(3), {"f1": HOSTILE})
    plan = Plan(
        decisions=(Swap(HOSTILE, "f2", "f3", "b3", "b1", reason=HOSTILE),), declined=(Declined(HOSTILE, HOSTILE),)
    )
    drawn = pictures.simulated(graph, plan)
    text = page.html(dataclasses.replace(pictures.picture(**drawn), title=HOSTILE, facts={HOSTILE: HOSTILE}))
    assert "<img" not in text
    assert text.count("</script>") == text.count("<script")
    assert HOSTILE in next(columns(charts(text), "node"))


def test_nothing_is_loaded():
    text = re.sub(r"<script\b.*?</script>", "", page.html(pictures.picture()), flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=\S+", text) == ['href="data:,">']
    assert "url(" not in text and "@import" not in text
    assert not re.findall(r"<script[^>]+src", page.html(pictures.picture()))


def long_timeline(levels):
    steps = tuple(Step(f"n{place}", "run", place / 1e3, (place + 1) / 1e3, n) for place, n in enumerate(levels))
    peak = max(steps, key=lambda step: step.live_bytes)
    return Timeline(steps, peak.live_bytes, peak.live_bytes, len(steps) / 1e3, 0, 0.0, peak)


def test_a_long_line_keeps_its_peak_and_what_follows_it():
    levels = [MIB] * 100_000
    levels[54_321] = 9 * MIB
    text = page.html(pictures.picture(plain=long_timeline(levels)))
    memory, node = next(columns(charts(text), "memory")), next(columns(charts(text), "node"))
    assert len(memory) <= 4000
    place = memory.index(9.0)
    assert node[place] == "n54321"
    assert memory[place + 1] == 1.0
    assert "Long lines are thinned out" in words(text)


def test_a_short_line_keeps_every_point():
    levels = [MIB + place for place in range(3000)]
    assert len(next(columns(charts(page.html(pictures.picture(plain=long_timeline(levels)))), "memory"))) == 3001


def large_picture(nodes=100_000, decisions=3000):
    """A chain of nodes with long names; values leave and come back."""
    names = [
        f"functional/stage_{place % 7}/block_{place:06d}/batch_normalization/moments/mean" for place in range(nodes)
    ]
    value = (ir.Value("float32", (256, 1024)),)
    made = [ir.Node(name, "Foo", (before,), outputs=value) for before, name in zip(names, names[1:], strict=False)]
    graph = ir.Graph("large", (ir.Node(names[0], "Placeholder", outputs=value), *made), (names[0],), (names[-1],))
    picked = range(1, nodes - 10, nodes // decisions)
    why = "the copy takes less time than what runs in the meantime, and nothing else is as large"
    swaps = tuple(Swap(names[p], names[p + 1], names[p + 3], names[p + 5], names[p + 8], reason=why) for p in picked)
    declined = tuple(Declined(names[p + 2], why) for p in picked)
    return pictures.picture(**pictures.simulated(graph, Plan(decisions=swaps, declined=declined)))


def test_a_hundred_thousand_nodes_fit_in_five_megabytes_within_seconds():
    picture = large_picture()
    start = time.perf_counter()
    text = page.html(picture)
    assert time.perf_counter() - start < 20  # 3 on a quiet machine
    assert len(text.encode()) <= 5_000_000
    said = words(text)
    total = len(picture.plan.decisions)
    assert f"The bars show the 1,000 largest of {total:,} decisions." in said
    assert said.count(f"The 500 largest of {total:,}, the largest first.") == 2


def test_without_bokeh_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ImportError, match=r"expected Bokeh.*not installed.*`pip install graphswap\[report\]`"):
        page.html(pictures.picture())


def test_blocks_of_gradients_are_nodes_and_no_rows():
    graph = rewrites.exchange(exchange_test.STEP, exchange_test.TWO)
    text = page.html(pictures.picture(**pictures.simulated(graph, Plan(decisions=exchange_test.TWO.decisions))))
    assert any("exchange" in kinds for kinds in columns(charts(text), "kind"))
