"""Programs compute what their ops would one after the other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphswap import parser
from graphswap.elementwise import _BLOCK_ELEMENTS, FUNCTIONS, SELECTS, Instruction, Program, computes


def random_program(rng):
    """Its first register is what selects."""
    given, instructions = rng.randint(2, 5), []
    for number in range(rng.randint(0, 12)):
        op = rng.choice([*FUNCTIONS, *SELECTS, "Identity"])
        count = FUNCTIONS[op].nin if op in FUNCTIONS else 2 if op in SELECTS else 1
        sources = tuple(rng.randrange(1, given + number) for _ in range(count))
        instructions.append(Instruction(op, (0, *sources) if op in SELECTS else sources))
    registers = given + len(instructions)
    results = tuple(rng.randrange(1, registers) for _ in range(rng.randint(1, 4)))
    return Program(given, tuple(instructions), results)


def one_by_one(program, given):
    """All registers, computed whole."""
    registers = list(given)
    with np.errstate(all="ignore"):
        for op, sources in program.instructions:
            read = [registers[source] for source in sources]
            if op in SELECTS:
                read = read[1:] if read[0] else read[2:]
            registers.append(FUNCTIONS[op](*read) if op in FUNCTIONS else read[0])
    return registers


@given(st.randoms(use_true_random=False), st.sampled_from([1, 1000, _BLOCK_ELEMENTS + 77]))
def test_a_program_computes_what_its_ops_compute(rng, length):
    program = random_program(rng)
    generator = np.random.default_rng(rng.randrange(1 << 30))
    arrays = [generator.normal(size=length).astype(np.float32) for _ in range(program.given)]
    arrays[0] = np.array(rng.random() < 0.5)
    arrays[2:3] = [np.float32(0.3).reshape(())] * len(arrays[2:3])
    before = [array.copy() for array in arrays]
    results = [np.full(length, 7, np.float32) if rng.random() < 0.8 else None for _ in program.results]
    program.run(arrays, results)
    registers = one_by_one(program, before)
    for register, result in zip(program.results, results, strict=True):
        if result is not None:
            np.testing.assert_array_equal(result, np.broadcast_to(registers[register], length))
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


@given(st.randoms(use_true_random=False))
def test_a_program_is_read_as_it_was_written(rng):
    program = random_program(rng)
    assert Program.parse(str(program)) == program


def test_a_program_as_text():
    momentum = Program(3, (Instruction("Mul", (2, 1)), Instruction("AddV2", (3, 0))), (4,))
    assert str(momentum) == "3; Mul 2 1; AddV2 3 0; 4"


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("Mul(%x, %y) : (float32[4])", True),
        ("Mul(%x, %scalar) : (float32[4])", True),
        ("Identity(%x) : (float32[4])", True),
        ("AddN(%x, %y) : (float32[4])", True),
        ("AddN(%x, %y, %x) : (float32[4])", False),  # numpy has no twin
        ("Mul(%scalar, %scalar) : (float32[])", False),
        ("Mul(%x, %row) : (float32[4])", False),  # stretches a value
        ("Tanh(%x) : (float32[4])", False),
        ("Mul(%half, %half) : (float16[4])", False),
        ("Cast(%half) : (float32[4])", False),
        ("Mul!(%x, %y) : (float32[4])", False),
        ("SelectV2(%is_finite, %x, %y) : (float32[4])", True),
        ("Select(%is_finite, %x, %scalar) : (float32[4])", True),
        ("SelectV2(%mask, %x, %y) : (float32[4])", False),  # each element by its own
    ],
)
def test_what_a_program_can_compute(node, expected):
    graph = parser.parse(
        f"""
        graph one(%x, %y, %row, %scalar, %half, %is_finite, %mask) -> () {{
          %x = Placeholder() : (float32[4])
          %y = Placeholder() : (float32[4])
          %row = Placeholder() : (float32[1])
          %scalar = Placeholder() : (float32[])
          %half = Placeholder() : (float16[4])
          %is_finite = Placeholder() : (bool[])
          %mask = Placeholder() : (bool[4])
          %node = {node}
        }}
        """
    )
    assert computes(graph, graph.by_name["node"]) == expected
