"""The table of `tools/model_data.py`, whose runs are too long for a test."""

from graphswap.tools import model_data
from graphswap.tools.trial import Result, Trial

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


GIB = 1 << 30
TRIAL = Trial("gpt", GIB, "1GiB")
FAR = {
    "far_bytes": {"host": 8 * GIB, "disk": 16 * GIB},
    "measured_host_bytes": 7 * GIB,
    "measured_disk_bytes": 15 * GIB,
}


def test_a_run_by_itself_is_set_against_the_least_that_has_to_move():
    report = {**FAR, "moved_bytes": [15 * GIB, 12 * GIB]}
    run = Result("", [7.0, 6.5, 6.0], [90.0, 40.0, 50.0], GIB, "", report, 0, [], 10 * GIB, 4 * GIB, 12 * GIB)
    assert model_data.least_moved_bytes(4 * GIB, 12 * GIB, 3 * GIB) == (2 * GIB, 3 * GIB)
    sizes = ("1.0GiB", "10.0GiB", "8.0GiB", "7.0GiB", "16.0GiB", "15.0GiB", "15.0GiB", "12.0GiB")
    times = ("2.79x", "90 s", "45 s", "7.000, 6.500, 6.000")
    assert model_data.alone_row(TRIAL, run) == ("gpt", "12.0GiB", "1GiB", *sizes, *times)


def test_what_fits_has_nothing_to_move():
    assert model_data.least_moved_bytes(GIB, 3 * GIB, 4 * GIB) == (0, 0)
    assert model_data.least_moved_bytes(GIB, 4 * GIB, 2 * GIB) == (0, GIB // 2)


def test_a_run_by_itself_that_is_refused_says_why():
    assert model_data.alone_row(TRIAL, Result(error="no room\nmore"))[:4] == ("gpt", "0B", "1GiB", "no room")
