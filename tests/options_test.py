import fractions
import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphswap import strategies
from graphswap.options import Options, format_bytes, parse_bytes

UNITS = "Write a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)."
NAMES = ", ".join(f'"{name}"' for name in strategies.STRATEGIES)


class Plain:
    def plan(self, graph, cost_model, memory_budget):
        raise NotImplementedError

    def __repr__(self):
        return "Plain()"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 * 2**30),
        ("2GB", 2_000_000_000),
        ("300MiB", 300 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        (" 20 kb ", 20_000),
        ("1tib", 2**40),
        ("7B", 7),
        ("1.1GB", 1_100_000_000),
        ("0.0015KB", 1),
    ],
)
def test_parse_bytes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "2", "2G", "2 Gi", "2iB", "-2GiB", "1e3MB", "1,5GiB", "2GiBs", "0GiB", "0.5B"]
)
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError) as error:
        parse_bytes(text)
    assert str(error.value) == f'expected a size such as "2GiB" or "300MB", received {text!r}. {UNITS}'


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (1023, "1023B"),
        (1024, "1.0KiB"),
        (300 * 2**20, "300.0MiB"),
        (2**30 - 1, "1.0GiB"),
        (1_400_000_000, "1.3GiB"),
        (5000 * 2**40, "5000.0TiB"),
        (-3 * 2**19, "-1.5MiB"),
    ],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(1, 2**50))
def test_a_formatted_size_can_be_read_back(nbytes):
    text = format_bytes(nbytes)
    digits = text.rstrip("BKMGTi")
    unit = parse_bytes("1" + text.removeprefix(digits))
    assert abs(parse_bytes(text) - nbytes) <= fractions.Fraction(unit, 20) + 1  # sizes are read in whole bytes


@pytest.mark.parametrize(
    ("given_budget", "kept"),
    [(1, 1), ("2GiB", 2**31), ("auto", "auto"), ("FREE", "free"), (" min ", "min")],
)
def test_memory_budget(given_budget, kept):
    assert Options(given_budget).memory_budget == kept


def test_defaults():
    assert Options("2GiB") == Options(2**31, "auto", "auto", 6.0, "raise")


BUDGET = 'memory_budget: expected bytes as an int, a size such as "2GiB", or "auto", "free" or "min"'
SWAP = 'swap_to: expected one of "auto", "host", "disk" or a directory'
STRATEGY = f"strategy: expected one of {NAMES} or an object with a method `plan`"
HOST = 'host_memory: expected bytes as an int, a size such as "12GiB", or "auto"'
ADVICE = "See graphswap.strategies.base.Strategy."
SECONDS = "planning_seconds: expected a number of seconds above 0"


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        (
            "memory_budget",
            0,
            ValueError,
            f'{BUDGET}; received 0. Write "min" for the smallest budget that can be reached.',
        ),
        (
            "memory_budget",
            -5,
            ValueError,
            f'{BUDGET}; received -5. Write "min" for the smallest budget that can be reached.',
        ),
        ("memory_budget", True, TypeError, f"{BUDGET}; received True, a bool. {UNITS}"),
        ("memory_budget", 2e9, TypeError, f"{BUDGET}; received 2000000000.0, a float. {UNITS}"),
        ("memory_budget", None, TypeError, f"{BUDGET}; received None, a NoneType. {UNITS}"),
        ("memory_budget", "2 gigs", ValueError, f"{BUDGET}; received '2 gigs'. {UNITS}"),
        ("memory_budget", "0MiB", ValueError, f"{BUDGET}; received '0MiB'. {UNITS}"),
        ("memory_budget", "atuo", ValueError, f"{BUDGET}; received 'atuo'. Did you mean \"auto\"?"),
        ("strategy", "autp", ValueError, f"strategy: expected one of {NAMES}, received 'autp'. Did you mean \"auto\"?"),
        ("strategy", "?", ValueError, f"strategy: expected one of {NAMES}, received '?'. Use one of these."),
        ("strategy", 3, TypeError, f"{STRATEGY}, received 3. {ADVICE}"),
        ("strategy", Plain, TypeError, f"{STRATEGY}, received {Plain!r}. {ADVICE}"),
        ("swap_to", "dsik", ValueError, f"{SWAP}, received 'dsik'. Did you mean \"disk\"?"),
        ("swap_to", "fast", ValueError, f"{SWAP}, received 'fast'. For a directory write ./fast."),
        ("swap_to", None, TypeError, f"{SWAP}, received None. Give the directory as text or as a pathlib.Path."),
        ("planning_seconds", 0, ValueError, f"{SECONDS}, received 0. Give a number such as 30."),
        ("planning_seconds", float("inf"), ValueError, f"{SECONDS}, received inf. Give a number such as 30."),
        ("planning_seconds", "30", TypeError, f"{SECONDS}, received '30'. Give a number such as 30."),
        ("planning_seconds", True, TypeError, f"{SECONDS}, received True. Give a number such as 30."),
        ("host_memory", -1, ValueError, f"{HOST}; received -1. Write 0 to keep variables out of host memory."),
        ("host_memory", 2e9, TypeError, f"{HOST}; received 2000000000.0, a float. {UNITS}"),
        ("host_memory", "2 gigs", ValueError, f"{HOST}; received '2 gigs'. {UNITS}"),
        ("host_memory", "atuo", ValueError, f"{HOST}; received 'atuo'. Did you mean \"auto\"?"),
        (
            "on_unsupported",
            "run_unchaged",
            ValueError,
            'on_unsupported: expected one of "raise", "run_unchanged", received \'run_unchaged\'. '
            'Did you mean "run_unchanged"?',
        ),
    ],
)
def test_refusals_say_what_was_expected_received_and_what_to_do(field, value, error, message):
    with pytest.raises(error) as caught:
        Options(**{"memory_budget": "auto", field: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(("given", "kept"), [("12GiB", 12 * 2**30), (0, 0), (" AUTO ", "auto")])
def test_host_memory_is_bytes_or_a_word(given, kept):
    assert Options("auto", host_memory=given).host_memory == kept


def test_only_a_word_or_a_directory_lets_variables_live_on_disk(tmp_path):
    named = [Options("auto", swap_to=where).names_disk for where in ("auto", "host", "disk", tmp_path)]
    assert named == [False, False, True, True]


def test_every_strategy_can_be_named():
    for name in strategies.STRATEGIES:
        assert Options("auto", strategy=name).strategy == name


def test_a_strategy_may_be_an_object():
    strategy = Plain()
    assert Options("auto", strategy=strategy).strategy is strategy


@pytest.mark.parametrize("word", ["auto", "host", "disk"])
def test_words_name_no_swap_directory(word):
    assert Options("auto", swap_to=word).swap_directory() is None


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_swap_directory(tmp_path, kind):
    assert Options("auto", swap_to=kind(tmp_path)).swap_directory() == tmp_path


def test_a_relative_swap_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path)
    found = [Options("auto", swap_to=name) for name in ("far", "./far", pathlib.Path("far"))]
    monkeypatch.chdir("/")
    assert [options.swap_directory() for options in found] == [tmp_path / "far"] * 3


def test_a_swap_directory_that_does_not_exist(tmp_path):
    options = Options("auto", swap_to=tmp_path / "far")
    with pytest.raises(ValueError) as error:
        options.swap_directory()
    assert str(error.value) == (
        f"swap_to: expected a directory that exists, received '{tmp_path}/far'. Make it, or name another one."
    )


def test_a_swap_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError) as error:
        Options("auto", swap_to=tmp_path).swap_directory()
    assert str(error.value) == (
        f"swap_to: expected a directory that can be written to, received '{tmp_path}'. "
        "Change its permissions, or name another one."
    )


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("2GiB", Options(2**31)),
        (2**31, Options(2**31)),
        (Options("min"), Options("min")),
        ({"memory_budget": "2GiB", "planning_seconds": 5}, Options(2**31, planning_seconds=5.0)),
    ],
)
def test_from_value(value, options):
    assert Options.from_value(value) == options


@pytest.mark.parametrize("value", [None, True, 2.5, ["2GiB"]])
def test_from_value_refuses(value):
    with pytest.raises(TypeError) as error:
        Options.from_value(value)
    assert str(error.value) == (
        'graphswap: expected a memory budget such as "2GiB", graphswap.Options or its config, '
        f'received {value!r}. Write graphswap="auto" for what the device has.'
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"memory_budjet": 1},
            'graphswap.Options: expected one of "memory_budget", "strategy", "swap_to", "planning_seconds", '
            '"on_unsupported", "plan", "jit_compile", "asynchronous", "host_memory", "shard_optimizer", received '
            "'memory_budjet'. Did you mean \"memory_budget\"?",
        ),
        (
            {"strategy": "auto"},
            "graphswap.Options: expected a memory_budget, received only strategy. "
            'Add memory_budget="auto" for what the device has.',
        ),
        (
            {},
            "graphswap.Options: expected a memory_budget, received only an empty config. "
            'Add memory_budget="auto" for what the device has.',
        ),
    ],
)
def test_from_config_refuses(config, message):
    with pytest.raises(ValueError) as error:
        Options.from_config(config)
    assert str(error.value) == message


def test_options_survive_saving(tmp_path):
    options = Options("2GiB", strategy=next(iter(strategies.STRATEGIES)), swap_to=tmp_path, planning_seconds=5)
    config = options.get_config()
    assert {type(value) for value in config.values()} == {int, str, float, bool, type(None)}
    assert Options.from_config(config) == options


def test_a_strategy_object_cannot_be_saved():
    with pytest.raises(TypeError) as error:
        Options("auto", strategy=Plain()).get_config()
    assert str(error.value) == (
        "strategy: expected a name, which can be saved, received Plain(). "
        "Add it to graphswap.strategies.STRATEGIES and give its name."
    )
