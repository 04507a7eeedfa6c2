"""Traces with open dimensions are planned for the largest arguments that were seen."""

import numpy as np
import tensorflow as tf

from graphswap import argument_shapes


def traced(*shapes):
    """The graph of a function of such arguments, which captures a variable, too."""
    variable = tf.Variable(1.0)

    def scaled(*arguments):
        return [argument * variable for argument in arguments]

    specs = [tf.TensorSpec(shape) for shape in shapes]
    return tf.function(scaled, autograph=False).get_concrete_function(*specs).graph


def test_arrays_are_the_leaves_that_have_shapes():
    x, y = np.zeros(2), tf.zeros(3)
    leaves = argument_shapes.arrays((({"x": x}, [y, "text", 1]), {"training": True}))
    assert len(leaves) == 2 and leaves[0] is x and leaves[1] is y


def test_open_dimensions_are_as_large_as_they_were_seen():
    largest = argument_shapes.Largest()
    assert largest.see([np.zeros((2, 7)), np.zeros(3)]) == ((2, 7), (3,))
    assert largest.see([np.zeros((5, 4)), np.zeros(1)]) == ((5, 4), (1,))
    assert largest.of(traced((None, None), (3,))) == ((5, 7), (3,))
    assert largest.of(traced((None, 4), None)) == ((5, 4), (3,))
    largest.see([np.zeros((5, 4)), np.zeros((1, 2))])  # another rank
    assert largest.of(traced((None, 4), None)) == ((5, 4), (1, 2))


def test_a_trace_accepts_what_its_open_dimensions_allow():
    accepted = argument_shapes.accepted(traced((None, 4), None), 2)
    assert accepted == ((None, 4), None)
    assert argument_shapes.accepts(accepted, ((9, 4), (1, 2)))
    assert not argument_shapes.accepts(accepted, ((9, 5), (1, 2)))
    assert not argument_shapes.accepts(accepted, ((9, 4, 1), (1, 2)))
    assert not argument_shapes.accepts(accepted, ((9, 4),))


def test_a_plan_covers_what_is_no_larger():
    assert argument_shapes.covers(((8, 4),), ((8, 3),))
    assert not argument_shapes.covers(((8, 4),), ((9, 3),))
    assert argument_shapes.covers((None,), ((9, 3),))
