"""The package is the same from a checkout and installed, loads only what it needs, and meets Keras in any order."""

import ast
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types

import pytest

import graphswap

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def mapping(monkeypatch):
    """Returns the folder of each package, as setup.py tells it to setuptools."""
    told = {}
    monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(setup=told.update))
    exec((ROOT / "setup.py").read_text())
    return {package: told["package_dir"].get(package, package) for package in told["packages"]}


@pytest.fixture
def small(tmp_path):
    """Returns a folder with the package's entrance, and small stand-ins for Keras and for what needs it."""
    (tmp_path / "graphswap").mkdir()
    for name in ("__init__.py", "_keras_import.py"):
        shutil.copy(ROOT / "graphswap" / name, tmp_path / "graphswap")
    files = {
        "keras/__init__.py": "from keras import config\nenabled = False",
        "keras/config.py": "import os\ndef backend(): return os.environ['KERAS_BACKEND']",
        "graphswap/keras_compile.py": """
import keras
def enable(): keras.enabled = True
def disable(): keras.enabled = False
""",
        "graphswap/report.py": "def report(model): return f'report on {model}'",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(code: str, folder: pathlib.Path, keras_backend: str = "tensorflow") -> str:
    """Runs code in a new Python that looks for modules in `folder` first, and returns what it prints."""
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    environment = {**os.environ, "KERAS_BACKEND": keras_backend}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_setup_maps_every_folder_into_the_package(mapping):
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert set(mapping.values()) == folders
    assert all(package.split(".")[0] == "graphswap" for package in mapping)


def test_a_checkout_and_an_installation_import_alike(mapping, tmp_path):
    for package, folder in mapping.items():
        shutil.copytree(ROOT / folder, tmp_path / package.replace(".", "/"))
    code = "import graphswap.rewrites.swap; print(sys.modules['graphswap.rewrites.swap'].__file__)"
    assert run(code, ROOT) == f"{ROOT}/rewrites/swap.py"
    assert run(code, tmp_path) == f"{tmp_path}/graphswap/rewrites/swap.py"


def test_the_planner_loads_no_tensorflow():
    code = "from graphswap import ir, plan, rewrites, simulator, strategies"
    assert run(f"{code}; print({{'tensorflow', 'keras'}} & sys.modules.keys())", ROOT) == "set()"


def test_every_exposed_name_has_a_home():
    tree = ast.parse((ROOT / "graphswap/__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    seen_by_type_checkers = {alias.name: node.module for node in imports for alias in node.names}
    assert seen_by_type_checkers == {name: f"graphswap.{home}" for name, home in graphswap._HOMES.items()}
    assert sorted(graphswap._HOMES) == sorted(graphswap.__all__)
    assert set(graphswap.__all__) < set(dir(graphswap))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'swapp'"):
        _ = graphswap.swapp


def test_without_tensorflow_the_error_says_what_to_install():
    code = """
sys.modules["tensorflow"] = None  # as if not installed
import graphswap
try:
    graphswap.UnsupportedGraphError
except ImportError as error:
    print(error)
"""
    printed = run(code, ROOT)
    assert "graphswap.UnsupportedGraphError needs tensorflow" in printed
    assert "pip install graphswap[cpu]" in printed


@pytest.mark.parametrize(
    "first", ["import graphswap", "import graphswap.report", "from graphswap.report import report"]
)
def test_report_is_the_function_whatever_was_imported_first(small, first):
    assert run(f"{first}; import graphswap; print(graphswap.report(1))", small) == "report on 1"


@pytest.mark.parametrize(
    ("code", "enabled"),
    [
        ("import keras, graphswap", True),
        ("import graphswap, keras", True),
        ("import graphswap.keras_compile, keras", True),
        ("import graphswap, importlib.util; importlib.util.find_spec('keras'); import keras", True),
        ("import graphswap, keras; graphswap.disable()", False),
        ("import graphswap; graphswap.disable(); import keras", False),
        ("import graphswap; graphswap.disable(); graphswap.enable(); import keras", True),
    ],
)
def test_the_compile_option_is_registered_in_any_order(small, code, enabled):
    assert run(f"{code}; print(keras.enabled)", small) == str(enabled)


@pytest.mark.parametrize("code", ["import keras, graphswap", "import graphswap, keras"])
def test_other_keras_backends_are_left_alone(small, code):
    assert run(f"{code}; print('graphswap.keras_compile' in sys.modules)", small, keras_backend="jax") == "False"


@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
def test_keras_reached_through_tensorflow_counts():
    code = "import graphswap, tensorflow as tf; tf.keras.Model; print('graphswap.keras_compile' in sys.modules)"
    assert run(code, ROOT) == "True"


def test_third_party_imports_are_declared(mapping):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}
    distributions = {"absl": "absl-py", "sklearn": "scikit-learn"}
    for path in (path for folder in mapping.values() for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"graphswap"}:
                assert distributions.get(top, top) in declared, f"{path} imports {top}: declare it in pyproject.toml."
