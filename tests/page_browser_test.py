"""A browser opens the page: it draws, without an error and without a network, in light and in dark."""

import shutil
import time

import pictures
import pytest
import testing
from selenium import webdriver

from graphswap import page
from graphswap.plan import Declined, Plan, Recompute, Swap

CHROMIUM, DRIVER = shutil.which("chromium") or "", shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1200,1600
"""
HOSTILE = "layer/<img src=x onerror=window.hacked=1>"

DEEP = """
const found = []
const visit = root => {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments[0])) found.push(element)
    if (element.shadowRoot) visit(element.shadowRoot)
  }
}
visit(document)
"""
# Whether a canvas holds text in the colour of the page's notes: pixels of nearly that colour.
HAS_TEXT = """
const [red, green, blue] = getComputedStyle(document.querySelector(".note")).color.match(/[0-9]+/g).map(Number)
return found.some(canvas => {
  if (!canvas.width || !canvas.height) return false
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
  let count = 0
  for (let i = 0; i < data.length; i += 4) {
    const distance = Math.abs(data[i] - red) + Math.abs(data[i + 1] - green) + Math.abs(data[i + 2] - blue)
    if (data[i + 3] > 200 && distance < 12) count++
  }
  return count > 50
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with all there is, and a name that would do harm."""
    graph = pictures.renamed(testing.chain(4), {"f2": HOSTILE})
    swap = Swap("f1", HOSTILE, freed_before="f3", in_after="b3", in_before="b1", reason=HOSTILE)
    plan = Plan(decisions=(swap, Recompute(("f3",), before="b3")), declined=(Declined(HOSTILE, "too small"),))
    picture = pictures.picture(measured=pictures.MEASURED, **pictures.simulated(graph, plan))
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page.html(picture), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(params=["light", "dark"])
def opened(request, browser, address):
    prefer(browser, request.param)
    browser.get(address)
    wait_for(lambda: len(deep(browser, ".bk-Figure")) == 3 and browser.execute_script(DEEP + HAS_TEXT, "canvas"))
    return browser


def prefer(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def deep(browser, selector):
    """Returns all elements that match, those in shadow trees too."""
    return browser.execute_script(f"{DEEP} return found", selector)


def text_of(browser, selector):
    return browser.execute_script(f"{DEEP} return found.map(element => element.shadowRoot.textContent)", selector)


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.05)


def hover(browser, chart, across, down):
    """Moves the mouse to a place in a chart, given as shares of its width and height."""
    browser.execute_script("window.scrollTo(0, 0)")
    box = browser.execute_script(f"{DEEP} return found[{chart}].getBoundingClientRect()", ".bk-Figure")
    x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
    for nudge in (0, 1):
        event = {"type": "mouseMoved", "x": x + nudge, "y": y}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def test_it_draws_without_an_error_and_loads_nothing(opened):
    problems = [entry for entry in opened.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert not problems
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [len(opened.find_elements("css selector", f"#{name} tbody tr")) for name in ("decisions", "declined")] == [
        2,
        1,
    ]
    labels = [label.text for label in deep(opened, ".bk-label")]
    assert labels[:4] == ["plain, simulated", "planned, simulated", "measured", "budget, 7.0MiB"]


def test_the_memory_chart_tells_the_node_under_the_mouse(opened):
    hover(opened, 0, across=0.5, down=0.5)
    wait_for(lambda: any("planned" in text for text in text_of(opened, ".bk-Tooltip")))
    (text,) = (text for text in text_of(opened, ".bk-Tooltip") if "planned" in text)
    assert "ms" in text and "MiB, runs: " in text and "measured 5.000 MiB" in text


def test_names_stay_text_also_under_the_mouse(opened):
    seen = []
    for across in range(12, 60, 2):
        hover(opened, 0, across / 100, down=0.5)
        time.sleep(0.02)
        seen += text_of(opened, ".bk-Tooltip")
    assert any(HOSTILE in text for text in seen)
    assert opened.execute_script("return window.hacked") is None


def test_a_bar_tells_what_is_decided_and_why(opened):
    for across in range(12, 95):
        hover(opened, 1, across / 100, down=0.32)
        if any("swap out" in text for text in text_of(opened, ".bk-Tooltip")):
            break
    (text,) = (text for text in text_of(opened, ".bk-Tooltip") if "swap out" in text)
    assert "f1" in text and "1.0MiB" in text and "to the host after" in text and HOSTILE in text


def test_a_click_in_the_legend_hides_a_line(opened):
    visible = "return [...Bokeh.documents[0].all_models].filter(m => m.type == 'GlyphRenderer' && !m.visible).length"
    before = opened.execute_script(visible)
    next(label for label in deep(opened, ".bk-label") if label.text == "measured").click()
    wait_for(lambda: opened.execute_script(visible) == before + 1)


def test_it_follows_the_scheme_while_it_is_open(opened):
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = opened.execute_script(ground)
    prefer(opened, "light" if before == "rgb(20, 24, 30)" else "dark")
    wait_for(lambda: opened.execute_script(ground) != before)
    wait_for(lambda: opened.execute_script(DEEP + HAS_TEXT, "canvas"))
