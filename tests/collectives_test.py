from exchange_test import STEP, TWO

from graphswap import ir, parser, rewrites
from graphswap.collectives import Packed, exchanges, packed


def test_sums_of_gradients_are_found_and_no_others():
    assert packed(STEP) == (Packed("sum", ("flat_c", "flat_b", "flat_a"), "pack", "split"),)


def test_a_sum_of_one_value_is_one_too():
    graph = parser.parse(
        """
        graph step(%g, %a, %token) -> () after(%set) {
          %g = Placeholder() : (float32[8])
          %a = Placeholder() {"held_bytes": [256]} : (resource[])
          %token = Placeholder() : (resource[])
          %key = Const() : (int32[])
          %sum = CollectiveReduceV2!(%g, %key, %key, %key, %token) {"workers": 2} : (float32[8])
          %set = AssignSubVariableOp!(%a, %sum) : ()
        }
        """
    )
    assert packed(graph) == (Packed("sum", ("g",), "", ""),)


def test_a_pack_that_others_read_stays_one():
    nodes = (*STEP.nodes, ir.Node("norm", "L2Loss", ("pack",), outputs=(ir.Value("float32"),)))
    assert packed(STEP.replace(nodes=nodes)) == (Packed("sum", ("pack",), "", ""),)


def test_a_graph_tells_its_blocks():
    assert exchanges(STEP) == ()
    assert exchanges(rewrites.exchange(STEP, TWO)) == TWO.exchanges
