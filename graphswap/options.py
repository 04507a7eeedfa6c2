"""Options: what the user may ask for, checked the moment it is given. Sizes in words, both ways."""

from __future__ import annotations

import dataclasses
import difflib
import fractions
import math
import numbers
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from graphswap import strategies
from graphswap.strategies.base import Strategy

BUDGET_WORDS = ("auto", "free", "min")
"""What the device has; the smallest budget without a predicted slow-down; the smallest reachable one."""
SWAP_WORDS = ("auto", "host", "disk")
UNSUPPORTED_WORDS = ("raise", "run_unchanged")

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b\s*", re.IGNORECASE)
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_UNIT_ADVICE = "Write a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)."


@dataclasses.dataclass(frozen=True)
class Options:
    """How a training step is fitted into memory.

    Attributes:
        memory_budget: The most the device's allocator may hold at any time: weights, optimizer state,
            activations, workspace, everything. Bytes as an int; a size such as "2GiB" or "2GB", which is
            turned into bytes; "auto": what the device has; "free": the smallest budget without a
            predicted slow-down; "min": the smallest reachable one.
        strategy: Name of an entry of `graphswap.strategies.STRATEGIES`, or an object with a method `plan`.
        swap_to: "host"; "disk": the system's temporary directory; a directory, as a path, in which the state of the
            training is kept (see `graphswap.restore`); "auto": host memory if the device has memory of its own, else
            the disk, but only for swaps. Where the disk is named and the device has memory of its own, host memory is
            used first, as far as `host_memory` goes.
        planning_seconds: Time after which the strategy stops looking for a better plan.
        on_unsupported: "raise" an UnsupportedGraphError for a step that can't be rewritten, or
            "run_unchanged".
        plan: A file of `StepReport.save_plan`: nothing is planned anew, and a step with another graph is refused.
        jit_compile: Whether XLA compiles the step; "auto": a few steps of the training run under XLA and under
            TensorFlow's executor, and the faster goes on; None: as `model.compile` is told, whose own "auto" is off.
        asynchronous: Whether, under ParameterServerStrategy, each batch is one worker's, whose gradients count when
            they come; else all workers share each batch.
        host_memory: The most host memory that variables may take during a step, in which each one that is updated
            counts twice: its old value stays until the step's end. Bytes as an int, 0 for none; a size such as "12GiB",
            which is turned into bytes; "auto": most of what is free. Variables that find no room go to the disk if
            `swap_to` names it, those that are used least for their bytes first.
        shard_optimizer: Whether each of several workers keeps and updates an equal part of the optimizer's state; what
            the weights change by is gathered in each step. A single worker keeps all.

    Raises:
        ValueError: If a value is out of range or unknown.
        TypeError: If a value is of a wrong type.
    """

    memory_budget: int | str
    strategy: str | Strategy = "auto"
    swap_to: str | os.PathLike[str] = "auto"
    planning_seconds: float = 6.0
    on_unsupported: str = "raise"
    plan: str | os.PathLike[str] | None = None
    jit_compile: bool | str | None = None
    asynchronous: bool = False
    host_memory: int | str = "auto"
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        for name, checked in (
            ("memory_budget", _budget(self.memory_budget)),
            ("strategy", _strategy(self.strategy)),
            ("swap_to", _swap_to(self.swap_to)),
            ("planning_seconds", _seconds(self.planning_seconds)),
            ("plan", _path(self.plan)),
            ("on_unsupported", _word("on_unsupported", self.on_unsupported, UNSUPPORTED_WORDS)),
            ("jit_compile", _jit_compile(self.jit_compile)),
            ("asynchronous", _flag("asynchronous", self.asynchronous)),
            ("host_memory", _host_memory(self.host_memory)),
            ("shard_optimizer", _flag("shard_optimizer", self.shard_optimizer)),
        ):
            object.__setattr__(self, name, checked)

    @classmethod
    def from_value(cls, value: Options | int | str | Mapping[str, Any]) -> Options:
        """Returns the options that a user means by `value`: options, a memory budget, or a saved config.

        Raises:
            ValueError: If a value is out of range or unknown.
            TypeError: If `value` is anything else.
        """
        if isinstance(value, Options):
            return value
        if isinstance(value, Mapping):
            return cls.from_config(value)
        if isinstance(value, str | numbers.Integral) and not isinstance(value, bool):
            return cls(value)  # pyright: ignore[reportArgumentType]
        raise TypeError(
            'graphswap: expected a memory budget such as "2GiB", graphswap.Options or its config, '
            f'received {value!r}. Write graphswap="auto" for what the device has.'
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Options:
        """Returns the options that `get_config` described.

        Raises:
            ValueError: If a name is unknown, the budget is missing, or a value is out of range or unknown.
            TypeError: If a value is of a wrong type.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in config:
            _word("graphswap.Options", name, names)
        if "memory_budget" not in config:
            raise ValueError(
                f"graphswap.Options: expected a memory_budget, received only {', '.join(config) or 'an empty config'}. "
                'Add memory_budget="auto" for what the device has.'
            )
        return cls(**config)

    def get_config(self) -> dict[str, Any]:
        """The options as plain Python values, for saving.

        Raises:
            TypeError: If the strategy is an object: only a name can be saved.
        """
        if not isinstance(self.strategy, str):
            raise TypeError(
                f"strategy: expected a name, which can be saved, received {self.strategy!r}. "
                "Add it to graphswap.strategies.STRATEGIES and give its name."
            )
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def names_disk(self) -> bool:
        """Whether `swap_to` lets variables live on disk."""
        return self.swap_to not in ("auto", "host")

    def swap_directory(self) -> pathlib.Path | None:
        """The directory that `swap_to` names, or None if it names none.

        Raises:
            ValueError: If files can't be made there.
        """
        if self.swap_to in SWAP_WORDS:
            return None
        directory = pathlib.Path(self.swap_to)
        if not directory.is_dir():
            raise ValueError(
                f"swap_to: expected a directory that exists, received '{directory}'. Make it, or name another one."
            )
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ValueError(
                f"swap_to: expected a directory that can be written to, received '{directory}'. "
                "Change its permissions, or name another one."
            )
        return directory


def parse_bytes(text: str) -> int:
    """Returns the bytes in a size such as "2GiB", "300MB" or "1.5 GiB", rounded down.

    Raises:
        ValueError: If the text is no size or less than a byte.
    """
    found = _SIZE.fullmatch(text)
    nbytes = int(fractions.Fraction(found[1]) * _POWERS[(found[2] or "").lower()]) if found else 0
    if not nbytes:
        raise ValueError(f'expected a size such as "2GiB" or "300MB", received {text!r}. {_UNIT_ADVICE}')
    return nbytes


def format_bytes(nbytes: float) -> str:
    """The size for people: "512B", "300.0MiB", "1.3GiB"."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(abs(size), 1) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f}B" if unit == "B" else f"{size:.1f}{unit}"


def _budget(value: object) -> int | str:
    expected = 'memory_budget: expected bytes as an int, a size such as "2GiB", or "auto", "free" or "min"'
    if isinstance(value, str):
        word = value.strip().lower()
        if word in BUDGET_WORDS:
            return word
        try:
            return parse_bytes(value)
        except ValueError:
            raise ValueError(f"{expected}; received {value!r}. {_guess(word, BUDGET_WORDS) or _UNIT_ADVICE}") from None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{expected}; received {value!r}, a {type(value).__name__}. {_UNIT_ADVICE}")
    if value <= 0:
        raise ValueError(f'{expected}; received {int(value)}. Write "min" for the smallest budget that can be reached.')
    return int(value)


def _host_memory(value: object) -> int | str:
    expected = 'host_memory: expected bytes as an int, a size such as "12GiB", or "auto"'
    if isinstance(value, str):
        word = value.strip().lower()
        if word == "auto":
            return word
        try:
            return parse_bytes(value)
        except ValueError:
            raise ValueError(f"{expected}; received {value!r}. {_guess(word, ('auto',)) or _UNIT_ADVICE}") from None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{expected}; received {value!r}, a {type(value).__name__}. {_UNIT_ADVICE}")
    if value < 0:
        raise ValueError(f"{expected}; received {int(value)}. Write 0 to keep variables out of host memory.")
    return int(value)


def _strategy(value: object) -> str | Strategy:
    if isinstance(value, str):
        return _word("strategy", value, strategies.STRATEGIES)
    if isinstance(value, type) or not callable(getattr(value, "plan", None)):
        raise TypeError(
            f"strategy: expected one of {_quoted(strategies.STRATEGIES)} or an object with a method `plan`, "
            f"received {value!r}. See graphswap.strategies.base.Strategy."
        )
    return value  # pyright: ignore[reportReturnType]


def _swap_to(value: object) -> str:
    expected = f"swap_to: expected one of {_quoted(SWAP_WORDS)} or a directory"
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{expected}, received {value!r}. Give the directory as text or as a pathlib.Path.")
    if value in SWAP_WORDS:
        return str(value)
    path = os.path.expanduser(os.fspath(value))
    if isinstance(value, str) and not re.search(r"[/\\]", path) and not os.path.isdir(path):
        advice = _guess(value, SWAP_WORDS) or f"For a directory write ./{value}."
        raise ValueError(f"{expected}, received {value!r}. {advice}")
    return os.path.abspath(path)


def _jit_compile(value: object) -> bool | str | None:
    if value is None or isinstance(value, bool) or value == "auto":
        return value  # pyright: ignore[reportReturnType]
    raise ValueError(f'jit_compile: expected True, False, "auto" or None, received {value!r}. Leave it out for None.')


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}: expected True or False, received {value!r}. Leave it out for False.")


def _path(value: object) -> str | None:
    if value is None:
        return None
    advice = "Write one with graphswap.report(model).step.save_plan(FILE)."
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"plan: expected the file of a plan, received {value!r}. {advice}")
    path = os.path.abspath(os.path.expanduser(os.fspath(value)))
    if not os.path.isfile(path):
        raise ValueError(f"plan: expected a file that exists, received '{path}'. {advice}")
    return path


def _seconds(value: object) -> float:
    expected = "planning_seconds: expected a number of seconds above 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, received {value!r}. Give a number such as 30.")
    seconds = float(value)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{expected}, received {value!r}. Give a number such as 30.")
    return seconds


def _word(name: str, value: object, known: Iterable[str]) -> str:
    if isinstance(value, str) and value in known:
        return value
    guess = _guess(value, known) or "Use one of these."
    raise ValueError(f"{name}: expected one of {_quoted(known)}, received {value!r}. {guess}")


def _guess(value: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), known, n=1)
    return f'Did you mean "{close[0]}"?' if close else ""


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
