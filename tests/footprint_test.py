import testing
import tiny_graphs
from hypothesis import given

from graphswap import footprint, parser
from graphswap.cost_model import CostModel, Profile, Workspace
from graphswap.plan import Plan
from graphswap.simulator import simulate


def of(text, cost_model=CostModel(), repeatable=(), evictable=None):  # noqa: B008 (never changed)
    return footprint.least_peak(parser.parse(text), cost_model, repeatable, evictable or {})


def test_a_plan_that_may_do_nothing_has_the_plain_peak():
    for text in (tiny_graphs.CHAIN, tiny_graphs.DIAMOND, tiny_graphs.RESIDUAL, tiny_graphs.MLP_STEP):
        plain = simulate(parser.parse(text), Plan(), CostModel())
        assert of(text).nbytes == plain.peak_bytes


def test_what_may_be_evicted_does_not_count_between_its_uses():
    # At b3 f1 and f2 are gone: x w f3 b3. At b2 and b1 one of them is back, and f3 is not: x w b3 f2 b2.
    evictable = {"f1": [(3, 7)], "f2": [(4, 6)]}
    assert of(tiny_graphs.CHAIN, evictable=evictable) == (5 * 256, "b2")
    # f2 alone: x w f1 f3 b3 at b3, and at b2 f1 besides.
    assert of(tiny_graphs.CHAIN, evictable={"f2": [(4, 6)]}) == (6 * 256, "b2")


def test_workspace_and_resident_bytes_count():
    profile = Profile("", {}, {"b3": Workspace((1,), (257,))})
    found = of(tiny_graphs.CHAIN, CostModel(profile=profile, resident_bytes=100))
    assert found == (6 * 256 + 256 + 512 + 100, "b3")


def test_an_output_is_free_where_some_plan_writes_it_over_an_input():
    text = """
    graph g(%x) -> (%last) {
      %x = Placeholder() : (float32[8,8])
      %a = MatMul(%x, %x) : (float32[8,8])
      %b = Relu(%a) : (float32[8,8])
      %c = L2Loss(%b) : (float32[])
      %last = ReluGrad(%a, %b) : (float32[8,8])
    }
    """
    model = CostModel(profile=Profile("", {}, {"b": Workspace((1024,))}))
    assert of(text, model) == (3 * 256 + 1024, "b")  # x a b
    assert of(text, model, repeatable={"a"}, evictable={"a": [(2, 4)]}) == (2 * 256 + 1024, "b")


def test_a_variable_counts_once_when_it_gets_a_new_buffer():
    text = """
    graph g(%v) -> () after(%update) {
      %v = Placeholder() {"held_bytes": [1024]} : (resource[])
      %read = ReadVariableOp!(%v) : (float32[256])
      %new = Exp(%read) : (float32[256])
      %update = AssignVariableOp!(%v, %new) after(%read) : ()
      %twice = Exp(%new) : (float32[256])
      %last = L2Loss(%twice) : (float32[])
    }
    """
    graph = parser.parse(text)
    assert of(text).nbytes == simulate(graph, Plan(), CostModel()).peak_bytes == 1024 + 1024 + 256


@given(testing.random_graphs(16))
def test_no_more_than_the_plain_peak(graph):
    assert footprint.least_peak(graph, CostModel(), (), {}).nbytes <= simulate(graph, Plan(), CostModel()).peak_bytes
