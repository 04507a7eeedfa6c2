"""Accelerators that are not here, for plans and simulations, after their makers' data sheets.

Rates are the data sheets' peaks times what well-tuned kernels and pinned copies reach of them, which is an assumption;
a device that is here is measured by `profiler` instead. Matrix products run in TF32 on Ampere and later, TensorFlow's
default for float32. Memory has no limit of its own here, so that any budget can be planned for.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphswap.cost_model import DeviceSpec, Link

_COMPUTE, _MEMORY, _LINK = 0.6, 0.8, 0.8
"""Of the peak of matrix products, of the device's memory, of the link to the host."""


def _device(name: str, flops: float, memory: float, link: float, launch_seconds: float = 5e-6) -> DeviceSpec:
    """A device by its peaks: operations and bytes per second, and bytes per second each way to the host."""
    host = Link(_LINK * link, _LINK * link, 10e-6, overlaps=True)
    # What a solid-state disk does; an assumption.
    disk = Link(2e9, 3e9, 100e-6, overlaps=True)
    return DeviceSpec(
        name=name,
        has_cpu_kernels=False,
        flops_per_second=_COMPUTE * flops,
        memory_bytes_per_second=_MEMORY * memory,
        launch_seconds=launch_seconds,
        links={"host": host, "disk": disk},
    )


_PCIE3, _PCIE4, _PCIE5 = 15.75e9, 31.5e9, 63.0e9
"""Bytes per second of 16 lanes each way (PCI-SIG)."""

DEVICES: Mapping[str, DeviceSpec] = {
    device.name: device
    for device in (
        _device("v100", 15.7e12, 900e9, _PCIE3),  # V100 SXM2 16 GB, data sheet; float32
        _device("a100", 156e12, 1555e9, _PCIE4),  # A100 SXM 40 GB, data sheet
        _device("h100", 494.5e12, 3350e9, _PCIE5),  # H100 SXM 80 GB, data sheet; without sparsity
        _device("h200", 494.5e12, 4800e9, _PCIE5),  # H200 SXM 141 GB, data sheet; without sparsity
        _device("gh200", 494.5e12, 4000e9, 450e9),  # GH200 96 GB, data sheet; NVLink-C2C
        _device("tpu_v4", 275e12, 1200e9, _PCIE3),  # bfloat16; Google Cloud's documentation; its link is an assumption
        _device("tpu_v5e", 197e12, 819e9, _PCIE3),  # bfloat16; Google Cloud's documentation; its link is an assumption
    )
}
"""By name."""
