"""The training step of `models.gpt` written in JAX, with JAX's own policies of what is kept for the backward pass.

Run in a process of its own, it trains on made-up words and prints a `trial.Result` as JSON:

    python -m graphswap.tools.jax_gpt '{"way": "remat of blocks", "steps": 12, "device": "gpu", "size": {"blocks": 12,
        "width": 1024, "heads": 16, "length": 1024, "batch": 8}}'
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from graphswap import pjrt
from graphswap.tools.trial import Result

WAYS = ("plain", "remat of blocks", "saves products", "offloads what blocks read")
"""What is kept of a block: all; what it reads; that and products without a batch dimension; what it reads, in the
host's memory."""
VOCABULARY = 1000


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a GPT."""

    blocks: int
    width: int
    heads: int
    length: int
    batch: int


def step(size: Size, way: str) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The step: blocks in a scan, Adam, float32.

    Args:
        size: Of the GPT.
        way: Out of `WAYS`.

    Returns:
        A function of state, words and the words that follow, to the new state and the loss.

    Raises:
        ValueError: If there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, received '{way}'.")
    import jax
    import jax.numpy as jnp
    from jax.ad_checkpoint import checkpoint_name

    depth = size.width // size.heads

    def normalised(x: Any, p: Any) -> Any:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-3) * p["gamma"] + p["beta"]

    def block(x: Any, p: Any) -> tuple[Any, None]:
        x = checkpoint_name(x, "read")
        y = normalised(x, p["norm1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[n]) + p[f"{n}_bias"] for n in ("query", "key", "value"))
        scores = jnp.einsum("bthk,bshk->bhts", q / math.sqrt(depth), k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bthk,hkd->btd", y, p["out"]) + p["out_bias"]
        y = jax.nn.gelu(normalised(x, p["norm2"]) @ p["up"] + p["up_bias"], approximate=False)
        return x + y @ p["down"] + p["down_bias"], None

    policies = jax.checkpoint_policies
    plain, repeated, products, offloaded = WAYS
    wrapped = {
        plain: block,
        repeated: jax.checkpoint(block, prevent_cse=False),
        products: jax.checkpoint(block, prevent_cse=False, policy=policies.dots_with_no_batch_dims_saveable),
        offloaded: jax.checkpoint(
            block,
            prevent_cse=False,
            policy=policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["read"],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        ),
    }[way]

    def loss(p: Any, words: Any, following: Any) -> Any:
        x = jax.lax.scan(wrapped, p["words"][words] + p["places"], p["blocks"])[0]
        scores = jax.nn.log_softmax(normalised(x, p["norm"]) @ p["head"] + p["head_bias"])
        return -jnp.take_along_axis(scores, following[..., None], -1).mean()

    def run(state: Any, words: Any, following: Any) -> tuple[Any, Any]:
        p, m, v, count = state
        value, gradient = jax.value_and_grad(loss)(p, words, following)
        m = jax.tree.map(lambda a, g: a + (g - a) * 0.1, m, gradient)
        v = jax.tree.map(lambda a, g: a + (g * g - a) * 0.001, v, gradient)
        rate = 3e-4 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        p = jax.tree.map(lambda w, a, b: w - rate * a / (jnp.sqrt(b) + 1e-7), p, m, v)
        return (p, m, v, count + 1), value

    return run


def arguments(size: Size, device: Any) -> tuple[Any, Any, Any]:
    """State and words as `step` takes them: shapes and types on a device, no values."""
    import jax

    placed = jax.sharding.SingleDeviceSharding(device)
    width, heads, depth, count = size.width, size.heads, size.width // size.heads, size.blocks

    def array(*shape: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def norm(*stacked: int) -> Any:
        return {"gamma": array(*stacked, width), "beta": array(*stacked, width)}

    projections = {n: array(count, width, heads, depth) for n in ("query", "key", "value")}
    projections |= {f"{n}_bias": array(count, heads, depth) for n in ("query", "key", "value")}
    blocks = {
        **projections,
        "norm1": norm(count),
        "norm2": norm(count),
        "out": array(count, heads, depth, width),
        "out_bias": array(count, width),
        "up": array(count, width, 4 * width),
        "up_bias": array(count, 4 * width),
        "down": array(count, 4 * width, width),
        "down_bias": array(count, width),
    }
    parameters = {
        "words": array(VOCABULARY, width),
        "places": array(size.length, width),
        "blocks": blocks,
        "norm": norm(),
        "head": array(width, VOCABULARY),
        "head_bias": array(VOCABULARY),
    }
    words = array(size.batch, size.length, dtype=np.int32)
    return (parameters, parameters, parameters, array()), words, words


def compiled(size: Size, way: str, device: Any, options: dict[str, str | bool] | None = None) -> Any:
    """The step as JAX compiles it, its state donated.

    Args:
        size: Of the GPT.
        way: Out of `WAYS`.
        device: Of JAX, here or not.
        options: XLA's debug options by name.
    """
    import jax

    lowered = jax.jit(step(size, way), donate_argnums=0).lower(*arguments(size, device))
    return lowered.compile(compiler_options=options)


def train(size: Size, way: str, steps: int, device: str) -> Result:
    """Trains with real arrays in this process.

    Args:
        size: Of the GPT.
        way: Out of `WAYS`.
        steps: How many steps to train.
        device: "cpu", "gpu" or "tpu".

    Returns:
        What came of it; the peak is 0 where the device counts no bytes. Its report has the bytes of the compiled step.

    Raises:
        DeviceError: If there is no such device.
        ImportError: If JAX is missing, or of a version that this was not tried with.
        ValueError: If there is no such way.
    """
    pjrt.check_version()
    import jax

    on = pjrt.local_device(device)
    program = compiled(size, way, on)
    state = jax.device_put(_initial(arguments(size, on)[0]), on)
    losses, seconds = [], []
    for words, following in _batches(size, steps):
        start = time.perf_counter()
        state, loss = program(state, jax.device_put(words, on), jax.device_put(following, on))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    report = {"compiled_bytes": pjrt.inspected(program).memory.device}
    return Result("", losses, seconds, pjrt.peak_bytes(on), report=report)


def _initial(shapes: Any) -> Any:
    """Weights and Adam's state at the start, in the host's memory."""
    import jax

    random = np.random.default_rng(0)

    def weights(path: Any, like: Any) -> np.ndarray:
        name = path[-1].key
        if name.endswith(("bias", "beta")):
            return np.zeros(like.shape, like.dtype)
        if name == "gamma":
            return np.ones(like.shape, like.dtype)
        return 0.02 * random.standard_normal(like.shape, like.dtype)

    parameters, mean, variance, _ = shapes
    zeros = (jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), moment) for moment in (mean, variance))
    return (jax.tree.map_with_path(weights, parameters), *zeros, np.float32(1))


def _batches(size: Size, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Words, and the word that follows each."""
    random = np.random.default_rng(0)
    for _ in range(count):
        text = random.integers(0, VOCABULARY, (size.batch, size.length + 1), np.int32)
        yield text[:, :-1], text[:, 1:]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        result = train(**{**asked, "size": Size(**asked["size"])})
    except (ImportError, ValueError, pjrt.DeviceError) as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(result)))
