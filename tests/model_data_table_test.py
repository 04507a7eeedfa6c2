"""The table of `tools/model_data.py`, whose runs are too long for a test."""

from graphswap.tools import model_data
from graphswap.tools.trial import Result

HEAD = ("gpt", "2.0GiB", "400MiB", "ResourceExhaustedError")
PLAIN = Result("", [1.0] * 3, [9.0, 2.0, 2.0], 2 << 30, "digest", {}, 0, [9.0, 4.0, 4.0])
SMALL = Result(error="tensorflow.python.framework.errors_impl.ResourceExhaustedError: no room\nmore")


def rows(**strategies):
    return model_data.rows("gpt", "400MiB", {model_data.SMALL: SMALL, model_data.PLAIN: PLAIN, **strategies})


def test_each_strategy_has_a_row_beside_plain():
    run = Result("", [1.0] * 3, [9.0, 3.0, 3.0], 390 << 20, "digest", {"places": 7}, 0, [9.0, 5.0, 5.0])
    other = Result("", [1.5] * 3, [9.0, 4.0, 4.0], 380 << 20, "digest", {"places": 8}, 0, [9.0, 8.0, 8.0])
    assert rows(auto=run, patrickstar=other) == [
        (*HEAD, "auto", "390.0MiB", "7", "5.00 s", "1.25x", "3.00 s", "1.50x", "equal to plain"),
        (*HEAD, "patrickstar", "380.0MiB", "8", "8.00 s", "2.00x", "4.00 s", "2.00x", "differ"),
    ]


def test_a_strategy_that_is_refused_says_why():
    assert rows(auto=Result(error="no plan\nmore")) == [(*HEAD, "auto", "no plan", *[""] * 6)]
