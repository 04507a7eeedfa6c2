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


@given(duals=st.lists(st.floats(-10, 10), min_size=2, max_size=2), budget=st.floats(0, 12))
def test_no_duals_give_more_than_the_optimum(duals, budget):
    missing = max(0.0, 10 - budget)
    best = 5 + min(missing, 4) / 4 + 3 * max(0.0, missing - 4) / 6
    assert bound.certificate(program(), np.array(duals)).seconds(budget) <= best + 1e-9
