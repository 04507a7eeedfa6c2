"""A plan on disk with all it takes to judge it again: the step's graph and its costs. Needs no TensorFlow to read."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from graphswap import ir, parser, simulator
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.options import format_bytes
from graphswap.plan import TIERS, Plan, PlanError

_FORMAT = "graphswap plan 1"
_DEVICE_FORMAT = "graphswap device 1"
_TITLES = {
    "plain_peak_bytes": "plain peak",
    "plain_seconds": "plain step",
    "predicted_peak_bytes": "planned peak",
    "predicted_seconds": "planned step",
    "swapped_bytes": "swapped out",
    "recomputed_seconds": "repeated",
    "bound_seconds": "no plan takes less than",
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the simulator says of a plan on a device.

    Attributes:
        plain: The step as it is.
        planned: The step under the plan.
        bound_seconds: No plan of its class is faster in its budget; None if that is not known for this device.
        time_scale: What the seconds of the timelines are to be multiplied by.
    """

    plain: simulator.Timeline
    planned: simulator.Timeline
    bound_seconds: float | None
    time_scale: float

    def fields(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "plain_peak_bytes": self.plain.peak_bytes,
            "plain_seconds": self.plain.seconds * self.time_scale,
            "predicted_peak_bytes": self.planned.allocated_peak_bytes,
            "predicted_seconds": self.planned.seconds * self.time_scale,
            "swapped_bytes": self.planned.swapped_bytes,
            "recomputed_seconds": self.planned.recomputed_seconds * self.time_scale,
            "bound_seconds": None if self.bound_seconds is None else self.bound_seconds * self.time_scale,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The same for people: titles and figures."""
        return [(_TITLES[name], number(name, value)) for name, value in self.fields().items()]


def number(name: str, value: float | None) -> str:
    """A figure of `Judgement.fields` for people, in the unit that its name says."""
    if value is None:
        return "-"
    return format_bytes(value) if name.endswith("_bytes") else f"{value:.4f} s"


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """A plan, its graph, and the costs it was made with.

    Attributes:
        plan: The plan.
        graph: The step.
        cost_model: Its costs.
    """

    plan: Plan
    graph: ir.Graph
    cost_model: CostModel

    def judge(self, device: DeviceSpec | None = None) -> Judgement:
        """Simulates the plan.

        Args:
            device: Another device, whose costs are worked out from its data sheet; None for the plan's own.

        Raises:
            simulator.NoRoom: If the device has no room for it.
        """
        cost_model = self.cost_model if device is None else CostModel(device, far_tier=self.cost_model.far_tier)
        planned = simulator.judge(self.graph, self.plan, cost_model)
        certificate, budget, profile = self.plan.certificate, self.plan.memory_budget, cost_model.profile
        has_bound = device is None and certificate is not None and budget is not None
        return Judgement(
            simulator.simulate(self.graph, Plan(), cost_model),
            planned,
            certificate.seconds(budget) if has_bound else None,  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
            1.0 if profile is None else profile.time_scale,
        )

    def to_json(self) -> str:
        """As JSON text; `from_json` reads it back."""
        profile = self.cost_model.profile
        return json.dumps(
            {
                "format": _FORMAT,
                "fingerprint": self.graph.fingerprint,
                "plan": json.loads(self.plan.to_json()),
                "device": device_fields(self.cost_model.device),
                "profile": profile and json.loads(profile.to_json()),
                "resident_bytes": self.cost_model.resident_bytes,
                "far_tier": self.cost_model.far_tier,
                "graph": str(self.graph),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> PlanFile:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: If the text is no plan file, or if its plan does not fit its graph.
        """
        fields = _fields(text)
        try:
            profile = None if fields["profile"] is None else Profile.from_json(json.dumps(fields["profile"]))
            device = device_from_fields(fields["device"])
            far_tier = fields["far_tier"]
            device.links[far_tier]
            cost_model = CostModel(device, profile, int(fields["resident_bytes"]), far_tier)
            graph = parser.parse(fields["graph"])
            plan = Plan.from_json(json.dumps(fields["plan"])).check(graph)
        except PlanError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"expected a plan file as written by `graphswap plan`, received a damaged one: {error!r}."
            ) from error
        return cls(plan, graph, cost_model)


def given(path: str | os.PathLike[str], graph: ir.Graph) -> tuple[Plan, CostModel | None]:
    """The plan in a file for a graph, and its costs if they are in the file.

    Args:
        path: A file that `PlanFile.to_json` or `Plan.to_json` wrote.
        graph: The graph.

    Raises:
        PlanError: If the file can't be read, is no plan, or is one for another graph, whose first difference it names.
    """
    text = _text(path)
    if not _is_plan_file(text):
        return Plan.from_json(text).check(graph), None
    made = PlanFile.from_json(text)
    if made.graph.fingerprint != graph.fingerprint:
        raise PlanError(
            f"expected a plan for graph '{graph.name}', received '{path}', which is for another one. "
            f"{_first_difference(made.graph, graph)} Plan again for this graph."
        )
    return made.plan.check(graph), made.cost_model


def first(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file, unchecked: its graph is known once its places and exchanges are carried out.

    Raises:
        PlanError: If the file can't be read or is no plan.
    """
    text = _text(path)
    return PlanFile.from_json(text).plan if _is_plan_file(text) else Plan.from_json(text)


def _first_difference(planned: ir.Graph, graph: ir.Graph) -> str:
    for number, (one, other) in enumerate(zip(planned.nodes, graph.nodes, strict=False)):
        if one != other:
            return f"The first difference is node {number}: planned was '{one}', here is '{other}'."
    if len(planned.nodes) != len(graph.nodes):
        return f"It has {len(planned.nodes)} nodes, here are {len(graph.nodes)}."
    one, other = (str(each.replace(nodes=())).split(" {")[0] for each in (planned, graph))
    return f"The nodes are the same: planned was '{one}', here is '{other}'."


def read(path: str | os.PathLike[str]) -> PlanFile:
    """Reads a plan file.

    Raises:
        PlanError: If the file can't be read or is none.
    """
    return PlanFile.from_json(_text(path))


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all.

    Args:
        path: The file. What is no file, such as /dev/stdout, is written to as it is.
        text: What to write.

    Raises:
        OSError: If it can't be written.
    """
    target = pathlib.Path(path)
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    target = target.resolve()  # a link stays one
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}-", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def device_fields(device: DeviceSpec) -> dict[str, Any]:
    """A device as plain values, for JSON."""
    return {"format": _DEVICE_FORMAT, **dataclasses.asdict(device)}


def device_from_fields(fields: Mapping[str, Any]) -> DeviceSpec:
    """Reads what `device_fields` gave.

    Raises:
        ValueError: If it is no device.
    """
    if not isinstance(fields, Mapping) or fields.get("format") != _DEVICE_FORMAT:
        raise ValueError("expected a device file as written by `graphswap calibrate`, received something else.")
    values = {name: value for name, value in fields.items() if name != "format"}
    try:
        links = {tier: Link(**values["links"][tier]) for tier in TIERS}
        network = {"network": Link(**values["network"])} if "network" in values else {}
        return DeviceSpec(**{**values, "links": links, **network})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected a device file as written by `graphswap calibrate`, received {error}.") from error


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PlanError(f"expected a plan file, received '{path}', which can't be read: {reason}.") from error


def _is_plan_file(text: str) -> bool:
    try:
        _fields(text)
    except PlanError:
        return False
    return True


def _fields(text: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise PlanError(f"expected a plan file, received something that is no JSON: {error}.") from error
    if not isinstance(fields, Mapping) or fields.get("format") != _FORMAT:
        raise PlanError("expected a plan file as written by `graphswap plan`, received other JSON.")
    return fields
