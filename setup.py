"""Maps the sibling folders into the one package `graphswap`. All else is in pyproject.toml."""

import setuptools

setuptools.setup(
    packages=["graphswap", "graphswap.graphdef", "graphswap.rewrites", "graphswap.strategies", "graphswap.tools"],
    package_dir={
        "graphswap.graphdef": "graphdef",
        "graphswap.rewrites": "rewrites",
        "graphswap.strategies": "strategies",
        "graphswap.tools": "tools",
    },
)
