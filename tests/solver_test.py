import numpy as np
import pytest

from graphswap import bound
from graphswap.strategies import solver


def program(upper=1.0):
    """One byte that is missing must be evicted at a second."""
    builder = bound.Builder()
    builder.row([(builder.column(upper, cost=1.0), 1.0)], lower=1.0, share=1.0)
    return builder.program(constant=2.0)


def test_an_optimum_with_duals(capfd):
    found = solver.solve(program(), 0.5, np.zeros(1), 10.0)
    assert found.columns == pytest.approx([0.5])
    assert bound.certificate(program(), found.duals).seconds(0.5) == pytest.approx(2.5)
    assert capfd.readouterr() == ("", "")


def test_what_can_t_be_is_an_error():
    with pytest.raises(solver.SolverError, match="[Ii]nfeasible"):
        solver.solve(program(upper=0.25), 0.5, np.zeros(1), 10.0)
