"""A GPU that is not here, nor anywhere else: as small as XLA's compiler lets it be."""

import importlib.util
import shutil

import pytest

from graphswap import pjrt

# Limits are those that NVIDIA publishes of compute capability 9.0; sizes and speeds are made up.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 2 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 100000000000 l2_cache_size: 1048576 clock_rate_ghz: 1 device_memory_size: 1073741824
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "a small GPU"
"""
needs_compiler = pytest.mark.skipif(
    not (importlib.util.find_spec("jax_cuda13_plugin") and (shutil.which("ptxas") or pjrt.TOOLKIT.is_dir())),
    reason="needs graphswap[target], and ptxas of a CUDA toolkit",
)
