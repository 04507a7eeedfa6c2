"""The house stands: imports point downward, TensorFlow stays at its doors, BUILD says what is imported."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Modules and folders from the ground up. An import goes to a lower floor or, inside a folder, to a lower step,
# where None stands for the folder's other modules. `package` is graphswap/__init__.py; `graphswap` is what it
# exposes, which it imports on first use.
FLOORS = (
    {"package"},
    {
        "ir",
        "allocator",
        "bound",
        "host_memory",
        "new_directory",
        "progress",
        "replanning",
        "state_directory",
    },
    {"elementwise"},
    {"far_memory"},
    {"exactness", "tiers", "placement"},
    {"plan", "cost_model", "liveness", "graphdef", "parser"},
    {"collectives", "devices", "far_value", "fusion", "replicas", "sharded_value", "variables"},
    {"actions", "profiler", "footprint", "shards"},
    {"host_variable", "simulator", "walk"},
    {"incremental", "picture"},
    {"strategies", "rewrites"},
    {"options", "argument_shapes", "artefact", "blocks", "model_data", "model_state"},
    {"pjrt", "plan_file", "page", "perfetto", "explanation"},
    {"report", "planning", "saved_model", "distribute"},
    {"xla", "back_ends", "server", "step_variables"},
    {"pipeline", "onnx_export", "stablehlo_export"},
    {"parameter_server"},
    {"keras_training"},
    {"keras_compile", "emulate", "callback", "loaded_step"},
    {"offline"},
    {"graphswap"},
    {"tools"},
    {"__main__"},
)
STEPS = {
    "graphdef": (
        {"traced", "definitions"},
        {"captures", "grappler", "tracing"},
        {"exporting", "hidden_bytes", "inlining"},
        {"bridge", "importing"},
        {"__init__"},
    ),
    "strategies": (
        {"base", "order", "solver"},
        {"gaps"},
        {"timing", "relaxation"},
        {"budgets"},
        {"fitting"},
        {"fetching", "recombination"},
        None,
        {"annealing"},
        {"joint"},
        {"auto"},
        {"__init__"},
    ),
    "rewrites": ({"far_update", "ordering", "pass_manager", "swap"}, None, {"__init__"}),
    "tools": (
        {"__init__"},
        {"architectures", "planning"},
        {"models"},
        {"trial", "steps"},
        {"benchmark", "commands", "jax_gpt"},
        {"launch"},
        None,
        {"graphswap_cli"},
    ),
}
TENSORFLOW_DOORS = {
    "graphdef",
    "exactness",
    "far_memory",
    "far_value",
    "tiers",
    "placement",
    "profiler",
    "host_variable",
    "sharded_value",
}
PRIVATE_TENSORFLOW_DOORS = {"graphdef", "profiler"}
PRIVATE_KERAS_DOORS = {"keras_compile"}
JAX_DOORS = {"pjrt", "tools/jax_gpt"}
PRIVATE_JAX_DOORS = {"pjrt"}


def sources() -> dict[str, list[str]]:
    """Returns the files of each module, by the module's name in BUILD."""
    package = ["graphswap/__init__.py", "graphswap/_keras_import.py"]
    found = {"package": package, "graphswap": []}
    for folder in ("graphswap", "graphdef", "rewrites", "strategies", "tools", "tests"):
        for path in sorted((ROOT / folder).glob("*.py")):
            file = f"{folder}/{path.name}"
            if file not in (*package, "tests/conftest.py"):
                found[file.removesuffix(".py").removesuffix("/__init__").removeprefix("graphswap/")] = [file]
    return found


SOURCES = sources()
TESTS = [name for name in SOURCES if name.startswith("tests/") and name.endswith("_test")]
MODULES = [name for name in SOURCES if not name.startswith("tests/")]


def imported(name: str) -> set[str]:
    """Returns the dotted names that a module imports, anywhere in it."""
    found = set()
    for file in SOURCES["package" if name == "graphswap" else name]:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def module_of(dotted: str) -> str | None:
    """Returns the module of this project that an imported name comes from; None for others' modules."""
    top, *rest = dotted.split(".")
    if top == "graphswap":
        return next((name for name in ("/".join(rest[:2]), "/".join(rest[:1])) if name in SOURCES), "graphswap")
    helper = f"tests/{rest[0] if top == 'tests' else top}"
    return helper if helper in SOURCES else None


def dependencies(name: str) -> set[str]:
    """Returns the modules of this project that a module imports, or else the package, which holds them all."""
    found = {module for module in map(module_of, imported(name)) if module not in (None, name)}
    if name == "package" or (name.startswith("tests/") and not found):
        return set()
    return found or {"package"}


def place(name: str) -> tuple[int, str, int]:
    """Returns a module's floor, its room on that floor, and its step in that room."""
    room, _, member = name.partition("/")
    floor = next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), None)
    assert floor is not None, f"'{name}' stands on no floor. Give it one in FLOORS, in tests/floors_test.py."
    steps = STEPS.get(room, (None,))
    named = [step for step, members in enumerate(steps) if members and (member or "__init__") in members]
    return floor, room, named[0] if named else steps.index(None)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    floor, room, step = place(name)
    for dependency in dependencies(name):
        its_floor, its_room, its_step = place(dependency)
        downward = its_floor < floor or (its_room == room and its_step < step)
        assert downward, f"'{name}' imports '{dependency}', which is not below it."


@pytest.mark.parametrize("name", MODULES)
def test_tensorflow_stays_at_its_doors(name):
    floor, room, _ = place(name)
    doors = {
        "tensorflow": room in TENSORFLOW_DOORS or floor > place("strategies")[0],
        "tensorflow.python": room in PRIVATE_TENSORFLOW_DOORS,
        # Lower, Keras's import could meet a half-imported module: see graphswap/_keras_import.py.
        "keras": floor >= place("keras_training")[0],
        "keras.src": name in PRIVATE_KERAS_DOORS,
        "jax": name in JAX_DOORS,
        "jax._src": name in PRIVATE_JAX_DOORS,
    }
    for dotted in imported(name):
        for door, open_here in doors.items():
            assert open_here or not f"{dotted}.".startswith(f"{door}."), f"'{name}' must not import {dotted}."


def read_build() -> dict[str, tuple[list[str], list[str]]]:
    """Returns the files and the dependencies of each target in BUILD."""
    targets = {}

    def py_library(name, srcs=(), deps=(), **_):
        targets[name] = (sorted(srcs), sorted(dep.removeprefix(":") for dep in deps))

    def py_test(name, srcs, deps, **_):
        py_library(f"tests/{name}", [file for file in srcs if file != "tests/conftest.py"], deps)

    rules = {"py_library": py_library, "py_test": py_test}
    others = dict.fromkeys(("package", "filegroup", "glob"), lambda *_, **__: [])
    exec((ROOT / "BUILD").read_text(), rules | others)
    return targets


def entry(name: str, srcs: list[str], deps: list[str]) -> str:
    """Returns the lines for a target in BUILD, as buildifier formats them."""

    def listed(items: list[str]) -> str:
        if len(items) < 2:
            return str(items).replace("'", '"')
        return "[\n" + "".join(f'        "{item}",\n' for item in items) + "    ]"

    labels = [f":{dependency}" for dependency in deps]
    if name in TESTS:
        return f'    "{name.removeprefix("tests/")}": {listed(labels)},\n'
    fields = [f'    name = "{name}",\n']
    fields += ["    testonly = True,\n"] if name.startswith("tests/") else []
    fields += [f"    srcs = {listed(srcs)},\n"] if srcs else []
    fields += [f"    deps = {listed(labels)},\n"] if deps else []
    return f"py_library(\n{''.join(fields)})\n\n"


def test_build_is_exact():
    expected = {name: (sorted(files), sorted(dependencies(name))) for name, files in SOURCES.items()}
    found = read_build()
    stale = sorted(found.keys() - expected.keys())
    wrong = [entry(name, *target) for name, target in expected.items() if found.get(name) != target]
    if stale:
        pytest.fail(f"BUILD has targets without a file: {', '.join(stale)}. Remove them.", pytrace=False)
    if wrong:
        pytest.fail(f"BUILD is not what the files import. It should hold:\n\n{''.join(wrong)}", pytrace=False)
