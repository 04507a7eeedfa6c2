import pytest
import testing
import tiny_graphs
from hypothesis import given
from hypothesis import strategies as st

from graphswap import ir, parser

NAMES = st.text("aZ09_./\\->^<é", min_size=1)
DIMENSIONS = st.none() | st.integers(0, 2**40)
VALUES = st.builds(
    ir.Value,
    st.sampled_from((*ir.ITEM_BYTES, "resource", "variant", "string")),
    st.none() | st.lists(DIMENSIONS, max_size=4).map(tuple),
)
REFS = st.builds(ir.ref, NAMES, st.integers(0, 30))
ATTRS = st.dictionaries(
    st.text(),
    st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text()
    | st.lists(st.integers(), max_size=3).map(tuple),
    max_size=3,
).map(lambda attrs: tuple(sorted(attrs.items())))


def tuples(items):
    return st.lists(items, max_size=3).map(tuple)


NODES = st.builds(
    ir.Node,
    name=NAMES,
    op=st.sampled_from(("MatMul", "_Arg", "Addons>Op2")),
    inputs=tuples(REFS),
    control_inputs=tuples(NAMES),
    outputs=tuples(VALUES),
    device=st.text(),
    stateful=st.booleans(),
    attrs=ATTRS,
    like=st.just("") | NAMES,
)
GRAPHS = st.builds(ir.Graph, NAMES, tuples(NODES), tuples(NAMES), tuples(REFS), tuples(NAMES))


@given(GRAPHS)
def test_parse_reads_back_what_str_prints(graph):
    assert parser.parse(str(graph)) == graph


@given(testing.random_graphs())
def test_parse_reads_back_training_steps(graph):
    again = parser.parse(str(graph))
    assert again == graph
    assert again.fingerprint == graph.fingerprint


@pytest.mark.parametrize("text", [getattr(tiny_graphs, name) for name in dir(tiny_graphs) if name.isupper()])
def test_tiny_graphs_keep_the_rules(text):
    testing.assert_graph_text(ir.verify(parser.parse(text)), text)


def test_every_part_of_a_node():
    text = r"""
    # A comment, a blank line, and white space where nobody needs it.

    graph g() -> (%a/b:1)after( %c ) {  # more
      %a/b = Op>Two!(%x->y, %z:3) {"n": 2, "shape": [1, 2], "t": "#"} like(%a) @"/device:\"0\"" after(%c)
        : (float32[2,?], half[*], resource[])  # the end of a node
    }
    """
    assert parser.parse(text) == ir.Graph(
        "g",
        (
            ir.Node(
                "a/b",
                "Op>Two",
                ("x->y", "z:3"),
                ("c",),
                (ir.Value("float32", (2, None)), ir.Value("half", None), ir.Value("resource")),
                '/device:"0"',
                True,
                (("n", 2), ("shape", (1, 2)), ("t", "#")),
                "a",
            ),
        ),
        (),
        ("a/b:1",),
        ("c",),
    )


def test_index_zero_is_left_out():
    assert parser.parse("graph g() -> (%a:0) {}").outputs == ("a",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'line 1: expected "graph", received the end of the text.'),
        ("# nothing\n\n", 'line 3: expected "graph", received the end of the text.'),
        ("graph g() -> () {\n", 'line 2: expected a node or "}", received the end of the text.'),
        ("graph g() {}", """line 1: expected "->", received '{}'."""),
        ("graph g() -> () {}\n}", "line 2: expected the end of the text, received '}'."),
        (
            "graph g(%a:1) -> () {}",
            """line 1: expected ",", received ':1) -> () {}'.""",
        ),
        (
            "graph g() -> () {\n  %a = (%b) : ()\n}",
            "line 2: expected an operation, received '(%b) : ()'.",
        ),
        (
            "graph g() -> () {\n\n  a = Op() : ()\n}",
            """line 3: expected a node or "}", received 'a = Op() : ()'.""",
        ),
        (
            "graph g() -> () {\n  %a = Op(b) : ()\n}",
            """line 2: expected a value's "%name" or "%name:index", received 'b) : ()'.""",
        ),
        (
            "graph g() -> () {\n  %a = Op(%b:x) : ()\n}",
            "line 2: expected an index, received ':x) : ()'.",
        ),
        (
            "graph g() -> () {\n  %a = Op() : (float32[-1])\n}",
            """line 2: expected a type such as "float32[32,?]", received 'float32[-1])'.""",
        ),
        (
            'graph g() -> () {\n  %a = Op() {"x": null} : ()\n}',
            "line 2: expected attributes that are numbers, booleans, strings or lists of integers, "
            """received '{"x": null} : ()'.""",
        ),
        (
            "graph g() -> () {\n  %a = Op() {x} : ()\n}",
            "line 2: expected attributes that are numbers, booleans, strings or lists of integers, "
            "received '{x} : ()'.",
        ),
        (
            "graph g() -> () {\n  %a = Op() @gpu : ()\n}",
            "line 2: expected a string in double quotes, received 'gpu : ()'.",
        ),
    ],
)
def test_errors_say_where_what_and_instead_of_what(text, message):
    with pytest.raises(parser.ParseError) as error:
        parser.parse(text)
    assert str(error.value) == message
    assert message.startswith(f"line {error.value.line}:")


def test_a_parse_error_is_a_graph_error():
    with pytest.raises(ir.GraphError):
        parser.parse("graph")
