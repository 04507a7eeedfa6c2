import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphswap import bound


def program():
    """Of two buffers of 4 and 6 bytes, which cost 1 and 3 seconds to evict, evict what does not fit 10 bytes."""
    builder = bound.Builder()
    columns = [builder.column(cost=1.0), builder.column(cost=3.0)]
    builder.row([(columns[0], 4.0), (columns[1], 6.0)], lower=10.0, share=1.0)
    builder.row([(columns[0], 1.0), (columns[1], 1.0)], upper=2.0)
    return builder.program(constant=5.0)


def test_the_bound_is_a_line_under_all_budgets():
    certificate = bound.certificate(program(), np.array([0.5, 0.0]))
    # At 0.5 seconds a byte the first buffer is worth more than it costs (1 - 0.5 * 4 = -1), the second just as much.
    assert certificate.seconds(6) == pytest.approx(5 + 0.5 * 4 - 1)
    assert certificate.seconds(3) == pytest.approx(5 + 0.5 * 7 - 1)
    assert certificate.seconds_per_byte() == 0.5


def test_rows_without_a_dual_are_left_out():
    certificate = bound.certificate(program(), np.array([0.25, 0.0]))
    assert certificate.program.rows.tolist() == [0, 0]
    assert len(certificate.duals) == 1


def test_duals_that_push_towards_an_infinite_side_count_for_nothing():
    certificate = bound.certificate(program(), np.array([-1.0, 1.0]))
    assert certificate.seconds(6) == 5.0


def test_json_keeps_the_bound():
    certificate = bound.certificate(program(), np.array([0.5, -0.25]))
    again = bound.Certificate.from_fields(json.loads(json.dumps(certificate.fields())))
    assert again.seconds(6) == certificate.seconds(6)


def test_the_least_budget_for_a_time():
    asked = program().least_budget(extra_seconds=2.5, most_bytes=10.0)
    # 2.5 seconds more evict the first buffer, and half of the second: 10 - 4 - 3 bytes stay.
    duals = np.array([0.1, 0.0, -0.2])  # a byte is a tenth of the ten; half a byte less costs a quarter of a second
    assert bound.certificate(asked, duals).seconds(0.0) == pytest.approx(0.3)
    assert asked.rows.tolist() == sorted(asked.rows)
    assert bound.certificate(asked, np.array([0.1, 0.0, 0.0])).seconds(0.0) == 0.0


@given(duals=st.lists(st.floats(-1, 1), min_size=3, max_size=3), extra=st.floats(0, 4))
def test_no_duals_give_more_than_the_least_budget(duals, extra):
    asked = program().least_budget(extra_seconds=extra, most_bytes=10.0)
    least = 10 - 4 * min(extra, 1.0) - 6 * max(0.0, extra - 1.0) / 3
    assert bound.certificate(asked, np.array(duals)).seconds(0.0) <= least / 10 + 1e-9


def test_an_envelope_is_the_highest_line():
    lines = [bound.certificate(program(), np.array([dual, 0.0])) for dual in (0.25, 0.5)]
    envelope = bound.Envelope(tuple(lines))
    assert envelope.seconds(9) == lines[0].seconds(9) > lines[1].seconds(9)
    assert envelope.seconds(2) == lines[1].seconds(2) > lines[0].seconds(2)
    again = bound.Envelope.from_fields(json.loads(json.dumps(envelope.fields())))
    assert [again.seconds(budget) for budget in range(12)] == [envelope.seconds(budget) for budget in range(12)]


@given(duals=st.lists(st.floats(-10, 10), min_size=2, max_size=2), budget=st.floats(0, 12))
def test_no_duals_give_more_than_the_optimum(duals, budget):
    missing = max(0.0, 10 - budget)
    best = 5 + min(missing, 4) / 4 + 3 * max(0.0, missing - 4) / 6
    assert bound.certificate(program(), np.array(duals)).seconds(budget) <= best + 1e-9
