"""Definitions of functions, as a SavedModel holds them."""

from __future__ import annotations

from typing import Any

from tensorflow.python.eager import context as context_lib
from tensorflow.python.saved_model import fingerprinting_utils


def called_definitions(definition: Any) -> list[Any]:
    """The definitions of all functions that a definition's nodes run, and of those that these run."""
    known = {definition.signature.name: definition}
    pending = [definition]
    while pending:
        for node in pending.pop().node_def:
            for attr in node.attr.values():
                for name in (attr.func.name, *(called.name for called in attr.list.func)):
                    if name and name not in known:
                        known[name] = context_lib.context().get_function_def(name)
                        pending.append(known[name])
    return list(known.values())[1:]


def write_fingerprint(directory: str) -> None:
    """Writes the fingerprint of the SavedModel in a directory, as TensorFlow does when it saves one."""
    fingerprinting_utils.write_fingerprint(directory)
