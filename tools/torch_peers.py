"""A GPT and a ResNet-50 in PyTorch, trained as `models` trains them, with PyTorch's own ways to save memory.

Run in a process of its own, which alone imports PyTorch, it trains on made-up data and prints a `trial.Result` as JSON:

    python -m graphswap.tools.torch_peers '{"model": "resnet50", "sizes": {"size": 224, "batch": 128},
        "way": "torch.utils.checkpoint", "steps": 12, "device": "cuda", "memory_bytes": 4294967296}'

Attention is written out as in Keras and in `jax_gpt`, so that all three keep the same values for the backward pass, and
products run in TF32 where the device can, as TensorFlow's do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graphswap.tools.trial import Result

try:
    torch: Any = importlib.import_module("torch")
except ModuleNotFoundError as error:
    raise ImportError(
        "graphswap.tools.torch_peers needs torch, which is not installed. Run `pip install graphswap[torch]`."
    ) from error

WAYS = ("plain", "torch.utils.checkpoint", "save_on_cpu")
"""Nothing; every block is run again; what the backward pass reads waits in pinned memory of the host."""
VOCABULARY, CLASSES = 1000, 10
Parts = tuple[Any, Any, Any]
"""Modules that are applied one after the other: what comes before the blocks, the blocks, what comes after."""

nn = torch.nn


# --- models -------------------------------------------------------------------------------------------------------


class _Places(nn.Module):
    """Embeds words and their places: (batch, length) to (batch, length, width)."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.register_buffer("numbers", torch.arange(length))

    def forward(self, words: Any) -> Any:
        return self.words(words) + self.places(self.numbers)


class _TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each after a normalisation and added to what it reads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-3), nn.LayerNorm(width, 1e-3)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        joint = self.read(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mixed = scores.masked_fill(~past, -1e9).softmax(-1) @ value
        x = x + self.write(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.perceptron(self.norm2(x))


def gpt(blocks: int, width: int, heads: int, length: int, batch: int) -> tuple[Parts, Iterator[tuple[Any, Any]]]:
    """A GPT, and endless batches of words and the word that follows each."""
    body = nn.ModuleList(_TransformerBlock(width, heads) for _ in range(blocks))
    parts = _Places(length, width), body, nn.Sequential(nn.LayerNorm(width, 1e-3), nn.Linear(width, VOCABULARY))

    def batches() -> Iterator[tuple[Any, Any]]:
        while True:
            text = torch.randint(VOCABULARY, (batch, length + 1))
            yield text[:, :-1], text[:, 1:]

    return parts, batches()


class _Bottleneck(nn.Module):
    """Three convolutions, added to what they read."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1, stride),
            nn.ReLU(),
            *_convolution(width, width, 3),
            nn.ReLU(),
            *_convolution(width, 4 * width, 1),
        )
        is_same = inputs == 4 * width and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Sequential(*_convolution(inputs, 4 * width, 1, stride))

    def forward(self, x: Any) -> Any:
        return (self.shortcut(x) + self.body(x)).relu()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[Any, Any]:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs, 1.001e-5, 0.01)


def resnet50(size: int, batch: int) -> tuple[Parts, Iterator[tuple[Any, Any]]]:
    """ResNet-50 as Keras has it, strides first and biases everywhere, and endless batches of images and classes."""
    blocks, inputs = nn.ModuleList(), 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for number in range(count):
            blocks.append(_Bottleneck(inputs, 64 << stage, stride=2 if stage and not number else 1))
            inputs = 256 << stage
    stem = nn.Sequential(*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))

    def batches() -> Iterator[tuple[Any, Any]]:
        while True:
            yield torch.rand(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    return (stem, blocks, head), batches()


MODELS: Mapping[str, tuple[Callable[..., tuple[Parts, Iterator[tuple[Any, Any]]]], Callable[..., Any]]] = {
    "gpt": (gpt, lambda weights: torch.optim.Adam(weights, 3e-4, eps=1e-7)),
    "resnet50": (resnet50, lambda weights: torch.optim.SGD(weights, 0.001)),
}
"""Each with its optimizer."""


# --- training -----------------------------------------------------------------------------------------------------


def train(
    model: str, sizes: Mapping[str, int], way: str, steps: int, device: str, memory_bytes: int | None = None
) -> Result:
    """Trains in this process.

    Args:
        model: A name of `MODELS`.
        sizes: What the model takes.
        way: Out of `WAYS`.
        steps: How many steps to train.
        device: "cpu" or "cuda".
        memory_bytes: What PyTorch may take of a GPU's memory; None for all.

    Returns:
        What came of it; the peak is 0 on a CPU, which counts no bytes.

    Raises:
        ValueError: If there is no such way or device.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, received '{way}'.")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU, PyTorch finds none. Install torch for CUDA, or name 'cpu'.")
    if on_gpu and memory_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total))
    make, optimizers = MODELS[model]
    (before, blocks, after), batches = make(**sizes)
    whole = nn.ModuleList((before, blocks, after)).to(device)
    optimizer = optimizers(whole.parameters())

    def outputs(x: Any) -> Any:
        x = before(x)
        for block in blocks:
            is_repeated = way == "torch.utils.checkpoint"
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if is_repeated else block(x)
        return after(x)

    losses, seconds = [], []
    for _, (inputs, targets) in zip(range(steps), batches, strict=False):
        start = time.perf_counter()
        inputs, targets = inputs.to(device), targets.to(device)
        swapping = torch.autograd.graph.save_on_cpu(pin_memory=on_gpu)
        with swapping if way == "save_on_cpu" else contextlib.nullcontext():
            found = outputs(inputs)
            loss = nn.functional.cross_entropy(found.reshape(-1, found.shape[-1]), targets.reshape(-1))
        del found
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # which waits for the device
        seconds.append(time.perf_counter() - start)
    return Result("", losses, seconds, torch.cuda.max_memory_allocated() if on_gpu else 0)


if __name__ == "__main__":
    try:
        result = train(**json.loads(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(result)))
