"""Where a step's variables live: moved to their tiers, kept and put back around each step, committed to disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from graphswap import allocator, graphdef, ir, model_state, placement, profiler, tiers
from graphswap.cost_model import DeviceSpec
from graphswap.host_variable import HostVariable, adopt, value_bytes, value_tier
from graphswap.plan import Place
from graphswap.report import StepReport
from graphswap.sharded_value import Sharding
from graphswap.variables import far_bytes, updates, values

_CHEAP = 0.05
"""Of a step: to keep values, or to settle them, takes no longer."""
_TRIALS = 3
"""Steps of a new plan before which values are kept, whatever that takes."""


class StepVariables:
    """The variables that a step's traces use, on the device and in far tiers.

    Around each step: `prepare`, then `done` and `commit`, or `restore` if the step has failed.

    Args:
        far_tiers: Where variables lie that are not on the device.
        state: Returns, by their names, what the state of a training consists of; None for what the step uses.
        is_compiled: Whether XLA compiles the step.
    """

    def __init__(
        self,
        far_tiers: tiers.Tiers,
        state: Callable[[], Mapping[str, tf.Variable]] | None = None,
        is_compiled: bool = False,
    ):
        self._tiers = far_tiers
        self._is_compiled = is_compiled
        self._state = state or self._used_variables
        self._used: dict[int, tf.Variable] = {}  # by the traces
        self._hosted: list[HostVariable] = []  # what the traces' plans keep in far tiers
        self._traced_tiers: list[tuple[tf.Variable, str]] = []  # where the variables were when the steps were traced
        self._layout = placement.Variables()  # of those on the device
        self._fences: list[Any] = []  # behind the holes for small buffers
        self._batch: list[Any] = []  # the step's arguments, where the device counts its bytes on it
        self._far: list[tuple[HostVariable, str, list[tf.Tensor]]] = []  # what was in which tier before the step
        self._trials = _TRIALS  # that are left
        self._keeping_seconds = self._settling_seconds = self._step_seconds = 0.0

    def variant(self, far_tiers: tiers.Tiers) -> StepVariables:
        """The variables of a step that trains the same model: its own layout, the same state.

        Args:
            far_tiers: Where that step's variables lie that are not on the device.
        """
        other = StepVariables(far_tiers, self._state, self._is_compiled)
        other._used, other._hosted = self._used, self._hosted
        other._fences, other._batch = self._fences, self._batch  # in each other's way
        return other

    # --- around a step -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Keeps the variables' values for the case that the step fails half way, and lets it meet the usual layout."""
        self._layout.forget()
        self._keep_far()
        if profiler.memory_in_use() is not None:
            self._keep()
            self._settle()

    def done(self, seconds: float) -> None:
        """Lets go of what was kept of variables on the device, as the step has run.

        Args:
            seconds: That it took.
        """
        self._layout.forget()
        self._batch.clear()
        self._trials -= 1
        self._step_seconds = seconds

    def restore(self) -> bool:
        """Gives variables the values of before the step, as far as they were kept. Whether those on the device were."""
        self._batch.clear()
        for variable, tier, contents in self._far:
            if variable.tier == tier:
                variable.restore(contents)
        self._far.clear()
        return self._layout.restore()

    def commit(self, step: StepReport | None) -> None:
        """Makes the step that has run the one whose state a directory keeps; lets files go that nobody needs.

        Args:
            step: Its report, which gets what far tiers hold if a trace's first steps run.

        Raises:
            SwapSpaceError: If the state can't be written. The step is done; the state is that of the one before.
        """
        if self._trials < 0 or not self._hosted:
            step = None
        if step is not None:
            step.measured_host_bytes = max(step.measured_host_bytes, self._host_bytes())
        self._far.clear()
        if self._hosted:
            if self._tiers.keeps_state:
                model_state.commit(self._state(), self._tiers)
            with self._tiers.explaining():
                if step is not None:
                    step.measured_disk_bytes = max(step.measured_disk_bytes, self._tiers.files_bytes())
                self._tiers.clean()

    def resume(self) -> None:
        """Lays the variables out anew, where others have run steps in between."""
        if profiler.memory_in_use() is not None and not self.is_stale():
            self._layout.keep()
            self._layout.pack()

    def _keep(self) -> None:
        """Copies what lies on the device.

        For the first steps of a plan always. Later, on the emulated accelerator: the input pipeline shares its memory,
        so any step may run out; but a compiled one takes its memory before it updates anything. On a GPU while it
        costs little beside the step. Without it, an out-of-memory error leaves some variables updated.
        """
        may_fail = not self._updates_in_place() and self._is_cheap(self._keeping_seconds)
        if len(self._layout) and (self._trials > 0 or may_fail):
            start = time.perf_counter()
            self._layout.keep()
            self._keeping_seconds = time.perf_counter() - start

    def _keep_far(self) -> None:
        """The same for variables in far tiers, at no cost: a step does not write over the values of before."""
        hosted = {id(variable): variable for variable in self._hosted}.values()
        for variable in hosted:
            variable.reserve()
        self._far = [(variable, variable.tier, variable.contents()) for variable in hosted]

    def _settle(self) -> None:
        """Lets every step meet the same layout of memory; on a GPU unless that takes long beside the step.

        Small variables that others assign come to lie in the holes that `arrange` leaves on the emulated accelerator.
        """
        if self._is_cheap(self._settling_seconds):
            start = time.perf_counter()
            self._layout.settle(allocator.HOLE_BYTES if self._updates_in_place() else 0)
            self._settling_seconds = time.perf_counter() - start

    def _updates_in_place(self) -> bool:
        """Whether steps leave variables where they are, and as they are if they fail. On a GPU that was not tried."""
        return self._is_compiled and profiler.is_emulated()

    def _is_cheap(self, seconds: float) -> bool:
        return profiler.is_emulated() or seconds <= _CHEAP * self._step_seconds

    def _host_bytes(self) -> int:
        """Bytes of variables in host memory: their values, and those of before or room for the next ones."""
        return sum(variable.far_bytes for variable, tier, _ in self._far if tier == variable.tier == "host")

    def _used_variables(self) -> Mapping[str, tf.Variable]:
        return model_state.named_variables(self._used.values())

    # --- of a trace --------------------------------------------------------------------------------------------

    def captured(self, func_graph: graphdef.FuncGraph) -> Mapping[str, tf.Variable]:
        """The variables that a traced step uses, by the names that they have in its graph."""
        found = graphdef.captured_variables(func_graph)
        self._used.update({id(variable): variable for variable in found.values()})
        return found

    def arrange(
        self,
        func_graph: graphdef.FuncGraph,
        captured: Mapping[str, tf.Variable],
        device: DeviceSpec,
        arguments: Sequence[Any],
    ) -> None:
        """Lays the device out as `simulator` takes it to be: building the model has left holes.

        Args:
            func_graph: The traced step.
            captured: From `captured`.
            device: With the number of holes for small buffers.
            arguments: Of the step; arrays among them are put on the emulated device, behind the variables.
        """
        self._clear()
        far = {id(captured[name].handle) for name in away(captured)}
        there = [variable for variable in graphdef.variables(func_graph) if id(variable.handle) not in far]
        parts = [
            placement.Variable(variable.store_handles[0], variable.dtype, True)
            for variable in captured.values()
            if isinstance(variable, HostVariable) and variable.sharded
        ]
        self._layout = placement.Variables([*there, *parts])
        if profiler.memory_in_use() is None:
            self._batch += arguments
            return
        with tf.init_scope():
            self._layout.keep()
            self._layout.pack()
            self._batch += map(_on_device, arguments)
            self._fences += placement.leave_holes([allocator.HOLE_BYTES] * device.holes, profiler.device_name())

    def _clear(self) -> None:
        """Takes from the device what `arrange` has put behind the variables."""
        self._fences.clear()
        self._batch.clear()  # planning's frames, which an error's traceback keeps alive, hold this list

    def _make_room(self, variables: Sequence[tf.Variable]) -> None:
        """Lets those of them leave that are on the emulated device: handles of far values come to lie in front.

        They are made while no variable is there, which would fill a hole that was left for them. Anywhere else they
        would cut the device's free memory in two.
        """
        leaving = [variable for variable in variables if value_tier(variable) == "device"]
        if not leaving or not profiler.is_emulated():
            return
        self._clear()

        def adopt_all() -> None:
            for variable in leaving:
                adopt(variable)

        with tf.init_scope():
            self._layout.pack(adopt_all)

    @property
    def batch(self) -> Sequence[Any]:
        """The step's arguments as `arrange` has left them, until the step has run or failed."""
        return self._batch

    def fence(self, budget: int) -> None:
        """Divides the device's free memory so that the allocator does not hand out more than the budget at once.

        Args:
            budget: Bytes of the device.
        """
        with tf.init_scope():
            room = budget - allocator.HOLE_BYTES - (profiler.memory_in_use() or 0)
            self._fences.append(placement.fence(room, profiler.device_name()))

    @property
    def fence_bytes(self) -> int:
        """What the buffers take that hold holes and fence in their places."""
        return len(self._fences) * allocator.ALIGNMENT_BYTES

    def fixed(self, graph: ir.Graph, captured: Mapping[str, tf.Variable]) -> list[Place]:
        """Where those lie that are not to move: the plan of another trace has placed them, or the step needs no value.

        Args:
            graph: The step, all variables on the device.
            captured: From `captured`.
        """
        hosted = {id(variable) for variable in self._hosted}
        return [
            Place(name, value_tier(captured[name]))
            for name in away(captured)
            if id(captured[name]) in hosted or not graph.consumers.get(name)
        ]

    def place(
        self,
        func_graph: graphdef.FuncGraph,
        graph: ir.Graph,
        captured: Mapping[str, tf.Variable],
        places: Sequence[Place],
        device: DeviceSpec,
        arguments: Sequence[Any],
        shards: Sequence[str] = (),
    ) -> None:
        """Moves variables to where they will live between steps, and lets the traced step reach them there.

        Args:
            func_graph: The traced step.
            graph: The same, all variables on the device.
            captured: From `captured`.
            places: Of those that will not live on the device.
            device: As for `arrange`.
            arguments: Likewise.
            shards: Variables of which each worker keeps a part.

        Raises:
            SwapSpaceError: If the disk has no room for them, or they can't be written or read.
        """
        taken = far_bytes(graph)
        disk_bytes = sum(taken.get(place.variable, 0) for place in places if place.tier == "disk")
        if disk_bytes:
            self._tiers.expect_room(disk_bytes + self.state_bytes(captured, places))
        # What this step does not use may be what another one's trace has divided.
        unused = [name for name, variable in captured.items() if not graph.consumers.get(name)]
        idle = [name for name in unused if value_tier(captured[name]) == "workers"]
        self._make_room([captured[place.variable] for place in places])
        if self.move(captured, places, [*shards, *idle]):
            self.arrange(func_graph, captured, device, arguments)
        self._traced_tiers += [(variable, value_tier(variable)) for variable in captured.values()]
        graphdef.capture(func_graph, [adopt(captured[name]).store_handles[0] for name in shards])
        if not places:
            return
        used, updated = values(graph), updates(graph)
        placed = {place.variable: adopt(captured[place.variable]) for place in places if place.variable in used}
        for name, variable in placed.items():
            variable.reserve(name in updated)
        self._hosted += placed.values()
        self._keep_far()
        graphdef.capture(func_graph, [handle for variable in placed.values() for handle in variable.store_handles])

    def shard(
        self,
        func_graph: graphdef.FuncGraph,
        captured: Mapping[str, tf.Variable],
        names: Sequence[str],
        sharding: Sharding,
        device: DeviceSpec,
        arguments: Sequence[Any],
    ) -> None:
        """Divides variables among workers, as far as they are not divided yet.

        Args:
            func_graph: The traced step.
            captured: From `captured`.
            names: Of the variables.
            sharding: How.
            device: As for `arrange`.
            arguments: Likewise.
        """
        self._make_room([captured[name] for name in names])
        whole = [variable for name in names if (variable := adopt(captured[name])).sharded is None]
        for variable in whole:
            variable.shard(sharding)
        if whole:
            self.arrange(func_graph, captured, device, arguments)

    def move(self, captured: Mapping[str, tf.Variable], places: Sequence[Place], shards: Sequence[str] = ()) -> bool:
        """Brings variables to their tiers, those without a place to the device. Whether any has moved.

        Args:
            captured: From `captured`.
            places: As for `place`.
            shards: What is divided among workers, and stays so.
        """
        tier_of = {**{place.variable: place.tier for place in places}, **dict.fromkeys(shards, "workers")}
        has_moved = False
        # What leaves goes first, to make room for what comes.
        for name in sorted(captured, key=lambda name: name not in tier_of):
            tier, variable = tier_of.get(name, "device"), captured[name]
            if tier != "device" or isinstance(variable, HostVariable):
                has_moved |= adopt(variable).tier != tier
                adopt(variable).move(tier, self._tiers)
        return has_moved

    def state_bytes(self, captured: Mapping[str, tf.Variable], places: Sequence[Place]) -> int:
        """The most that a state takes on disk, the last one's files included, beside the variables that lie there."""
        on_disk = {id(captured[place.variable]) for place in places if place.tier == "disk"}
        if not places or not self._tiers.keeps_state:
            return 0
        return 2 * sum(value_bytes(variable) for variable in self._state().values() if id(variable) not in on_disk)

    def is_stale(self) -> bool:
        """Whether variables have moved since the steps were traced."""
        return any(value_tier(variable) != tier for variable, tier in self._traced_tiers)

    def try_out(self) -> None:
        """Counts steps from now on as the first ones of a plan."""
        self._trials = _TRIALS

    def forget(self) -> None:
        """Drops what is known of the traces."""
        self._traced_tiers.clear()
        self._layout = placement.Variables()
        self.try_out()


def away(captured: Mapping[str, tf.Variable]) -> list[str]:
    """Which variables are in far tiers now."""
    return [name for name, variable in captured.items() if value_tier(variable) != "device"]


def shard_bytes(captured: Mapping[str, tf.Variable]) -> int:
    """What this worker's parts of divided variables take."""
    parts = [variable.sharded for variable in captured.values() if isinstance(variable, HostVariable)]
    return sum(allocator.rounded(part.nbytes) for part in parts if part is not None)


def hosted_bytes(captured: Mapping[str, tf.Variable]) -> dict[str, int]:
    """What each variable takes that is in host memory now."""
    return {name: value_bytes(variable) for name, variable in captured.items() if value_tier(variable) == "host"}


def expect_on_device(captured: Mapping[str, tf.Variable]) -> None:
    """Raises a ValueError if variables of a step of several devices are in far tiers."""
    names = away(captured)
    if names:
        raise ValueError(
            f"graphswap: expected all variables on the device in a step of several devices, received '{names[0]}' "
            f"in the tier '{value_tier(captured[names[0]])}'. Make the model outside of graphswap.host_variables(), or "
            "train on one device."
        )


def placed(arguments: Any, is_new: bool) -> Any:
    """A step's arguments, arrays in new buffers of the emulated device.

    Args:
        arguments: Nested tensors and arrays.
        is_new: Whether this is the first run of a trace. Then these stay outside, as the variables are packed then;
            `StepVariables.arrange` puts others in their place.
    """
    if not profiler.is_emulated():
        return arguments
    return tf.nest.map_structure(placement.outside_device if is_new else _on_device, arguments)


def released(results: Any) -> Any:
    """A step's results, small ones no longer on the emulated device."""
    return tf.nest.map_structure(placement.result_outside_device, results) if profiler.is_emulated() else results


def _on_device(argument: Any) -> Any:
    return placement.on_device(argument, profiler.device_name()) if profiler.is_emulated() else argument
