"""Reads the printed form of a graph back. `ir.py` holds the grammar.

White space and comments, from "#" to the end of the line, may stand between any two tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from graphswap import ir

_T = TypeVar("_T")

_GAP = re.compile(r"(?:\s|#.*)*")
_NAME = re.compile(r"[^\s%:,()#]+")
_INDEX = re.compile(r":(\d+)")
_OP = re.compile(r"[\w>]+")
_VALUE = re.compile(r"(\w+)\[(\*|(?:(?:\?|\d+)(?:,(?:\?|\d+))*)?)\]")
_JSON = json.JSONDecoder()


class ParseError(ir.GraphError):
    """A text that is not the printed form of a graph.

    Attributes:
        line: Number of the line, counted from 1.
    """

    def __init__(self, line: int, expected: str, received: str):
        super().__init__(f"line {line}: expected {expected}, received {received}.")
        self.line = line


def parse(text: str) -> ir.Graph:
    """Returns the graph that prints as `text`: `parse(str(graph)) == graph`.

    Whether the graph keeps the rules of the IR is left to `ir.verify`.

    Raises:
        ParseError: If the text does not follow the grammar.
    """
    reader = _Reader(text)
    reader.expect("graph")
    name = reader.match(_NAME, "the name of the graph").group()
    inputs = reader.items(reader.name)
    reader.expect("->")
    outputs = reader.items(reader.ref)
    control_outputs = reader.items(reader.name) if reader.accept("after") else ()
    reader.expect("{")
    nodes = []
    while not reader.accept("}"):
        nodes.append(_node(reader))
    reader.expect_end()
    return ir.Graph(name, tuple(nodes), inputs, outputs, control_outputs)


def _node(reader: _Reader) -> ir.Node:
    name = reader.name('a node or "}"')
    reader.expect("=")
    op = reader.match(_OP, "an operation").group()
    stateful = reader.accept("!")
    inputs = reader.items(reader.ref)
    attrs = reader.attrs() if reader.next_is("{") else ()
    like = ""
    if reader.accept("like"):
        reader.expect("(")
        like = reader.name()
        reader.expect(")")
    device = reader.string() if reader.accept("@") else ""
    control_inputs = reader.items(reader.name) if reader.accept("after") else ()
    reader.expect(":")
    return ir.Node(name, op, inputs, control_inputs, reader.items(reader.value), device, stateful, attrs, like)


class _Reader:
    """A position in a text, and the tokens that may follow it."""

    def __init__(self, text: str):
        self._text = text
        self._advance(0)

    def next_is(self, literal: str) -> bool:
        return self._text.startswith(literal, self._at)

    def accept(self, literal: str) -> bool:
        found = self.next_is(literal)
        if found:
            self._advance(self._at + len(literal))
        return found

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            raise self._error(f'"{literal}"')

    def expect_end(self) -> None:
        if self._at < len(self._text):
            raise self._error("the end of the text")

    def match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(what)
        self._advance(found.end())
        return found

    def items(self, item: Callable[[], _T]) -> tuple[_T, ...]:
        self.expect("(")
        found = []
        while not self.accept(")"):
            if found:
                self.expect(",")
            found.append(item())
        return tuple(found)

    def name(self, what: str = 'a node\'s "%name"') -> str:
        if not self.next_is("%"):
            raise self._error(what)
        self._at += 1
        return self.match(_NAME, "a node's name").group()

    def ref(self) -> str:
        name = self.name('a value\'s "%name" or "%name:index"')
        return ir.ref(name, int(self.match(_INDEX, "an index").group(1)) if self.next_is(":") else 0)

    def value(self) -> ir.Value:
        dtype, dims = self.match(_VALUE, 'a type such as "float32[32,?]"').groups()
        if dims == "*":
            return ir.Value(dtype, None)
        return ir.Value(dtype, tuple(None if d == "?" else int(d) for d in dims.split(",") if d))

    def attrs(self) -> tuple[tuple[str, ir.Attr], ...]:
        what = "attributes that are numbers, booleans, strings or lists of integers"
        start = self._at
        found = self._json(what)
        for name, value in found.items():
            if isinstance(value, list) and all(type(item) is int for item in value):
                found[name] = tuple(value)
            elif not isinstance(value, int | float | str):
                self._at = start
                raise self._error(what)
        return tuple(sorted(found.items()))

    def string(self) -> str:
        if not self.next_is('"'):
            raise self._error("a string in double quotes")
        return self._json("a string in double quotes")

    def _json(self, what: str) -> Any:
        try:
            found, end = _JSON.raw_decode(self._text, self._at)
        except ValueError as error:
            raise self._error(what) from error
        self._advance(end)
        return found

    def _advance(self, position: int) -> None:
        gap = _GAP.match(self._text, position)
        self._at = gap.end() if gap else position

    def _error(self, expected: str) -> ParseError:
        line = self._text.count("\n", 0, self._at) + 1
        rest = self._text[self._at : self._at + 60].partition("\n")[0].rstrip()
        return ParseError(line, expected, f"'{rest}'" if rest else "the end of the text")
