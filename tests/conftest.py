"""Makes the checkout importable without installing it, and quietens TensorFlow."""

import os
import pathlib
import sys

import hypothesis
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Must be set before TensorFlow is loaded; tests/trainings.py says why.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
# JAX would look for the GPUs of all its plugins, and say of each that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

pytest.register_assert_rewrite("testing", "trainings")

# Runners are slow at times; that is not a failure.
hypothesis.settings.register_profile("graphswap", deadline=None)
hypothesis.settings.load_profile("graphswap")

if __name__ == "__main__":  # BUILD runs each test file through here
    sys.exit(pytest.main(sys.argv[1:]))
