"""What README.md shows works, and what it points at is there."""

import pathlib
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf

import graphswap
from graphswap.tools import graphswap_cli

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def names():
    """What the snippets take for granted."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    images, labels = np.ones((8, 4), "float32"), np.zeros(8, "int32")
    weights = tf.Variable(tf.zeros((4, 3)))

    def train_step(images, labels):
        with tf.GradientTape() as tape:
            logits = images @ weights
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        weights.assign_sub(0.1 * tape.gradient(loss, weights))
        return loss

    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)
    return {
        "graphswap": graphswap,
        "model": model,
        "build_model": lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")]),
        "dataset": dataset,
        "train_step": train_step,
        "images": images,
        "labels": labels,
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, names, capsys):
    exec(snippet, names)
    if "print(graphswap.report(" in snippet:
        assert "budget  2.0GiB" in capsys.readouterr().out


def test_the_first_snippet_trains(names):
    before = [weights.copy() for weights in names["model"].get_weights()]
    exec(SNIPPETS[0], names)
    assert any((old != new).any() for old, new in zip(before, names["model"].get_weights(), strict=True))


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("    ")]
    for command in commands:
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile
        elif command[0] == "graphswap":
            assert command[1] in graphswap_cli.COMMANDS
    assert {("make", "demo"), ("make", "test")} <= {tuple(command) for command in commands}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points at {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor in [title.lower().replace(" ", "-") for title in titles]


def test_numbers_come_from_the_measurements():
    """Each cell of README's table stands in the row of that model and budget in docs/measurements.md."""
    _, _, *rows = _table(README.partition("<!-- measured")[2].partition("<!-- end -->")[0])
    measured = _table((ROOT / "docs/measurements.md").read_text())
    for row in rows:
        assert any(set(row) <= set(line) for line in measured), f"not in docs/measurements.md: {row}"


def _table(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
