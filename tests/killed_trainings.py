"""Trains with variables on disk and in host memory, is killed again and again, and goes on from what each time is left.

    python killed_trainings.py DIRECTORY KILLS STEPS

Each life is a fork of this process, which has imported TensorFlow but never run it. A life reads the state that the
last one left and sends the checksum of what it has read, then that of its variables after each step, when the step's
state is in the directory. Prints, for each kill, the last step that was reported and the step that the next life found.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback

import numpy as np
import tensorflow as tf

import graphswap
from graphswap import profiler, tiers
from graphswap.cost_model import Link

BATCH = np.random.default_rng(1).normal(size=(8, 160)).astype("float32")


def make_step():
    """A step of gradient descent with momentum, and its variables: six of 100 KiB and a small one."""
    rng = np.random.default_rng(0)
    weights = [tf.Variable(rng.normal(0, 0.1, (160, 160)).astype("float32"), name=f"weight{i}") for i in range(3)]
    momenta = [tf.Variable(np.zeros((160, 160), "float32"), name=f"momentum{i}") for i in range(3)]
    bias = tf.Variable(np.zeros(160, "float32"), name="bias")

    def step(batch):
        with tf.GradientTape() as tape:
            y = batch
            for weight in weights:
                y = tf.nn.relu(y @ weight + bias)
            loss = tf.reduce_mean((y - 1) ** 2)
        *gradients, bias_gradient = tape.gradient(loss, [*weights, bias])
        for weight, momentum, gradient in zip(weights, momenta, gradients, strict=True):
            momentum.assign(momentum * 0.9 + gradient)
            weight.assign_sub(0.01 * momentum)
        bias.assign_sub(0.01 * bias_gradient)
        return loss

    return step, [*weights, *momenta, bias]


def checksum(variables):
    bits = b"".join(variable.numpy().tobytes() for variable in variables)
    return int(tf.strings.to_hash_bucket_fast(bits, 2**62))


def plain_checksums(steps):
    """After 0, 1, 2, ... steps of plain TensorFlow."""
    step, variables = make_step()
    function, found = tf.function(step), [checksum(variables)]
    for _ in range(steps):
        function(BATCH)
        found.append(checksum(variables))
    return found


def write_plan(file):
    step, _ = make_step()
    options = {"swap_to": file.parent, "host_memory": "450KB", "planning_seconds": 0.5}
    function = graphswap.function(step, memory_budget="400KB", **options)
    function(BATCH)
    report = graphswap.report(function).step
    assert {place.tier for place in report.plan.places} == {"host", "disk"}, report.plan
    report.save_plan(file)
    shutil.rmtree(tiers.state_path(file.parent))


def live(directory, send):
    profiler.measure_link = lambda *arguments: Link(1e9, 1e9, 0.0)  # takes a second, and decides nothing here
    step, variables = make_step()
    if tiers.state_path(directory).exists():
        graphswap.restore(variables, directory)
    send(checksum(variables))
    function = graphswap.function(step, memory_budget="400KB", swap_to=directory, plan=directory / "plan.json")
    while True:
        function(BATCH)
        send(checksum(variables))


def in_child(act):
    """Runs `act(send)` in a fork. Returns its process and where what it sends can be read, a line each."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(source)
            act(lambda value: os.write(sink, f"{json.dumps(value)}\n".encode()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(sink)
    return child, os.fdopen(source)


def main(directory, kills, steps):
    directory, rng = pathlib.Path(directory), random.Random(0)
    child, lines = in_child(lambda send: send(plain_checksums(steps)))
    plain = json.loads(lines.readline())
    os.waitpid(child, 0)
    step_of = {value: number for number, value in enumerate(plain)}
    assert len(step_of) == len(plain), "the training no longer changes its variables"
    child, _ = in_child(lambda send: write_plan(directory / "plan.json"))
    os.waitpid(child, 0)
    reported, found = 0, []
    for _ in range(kills + 1):
        child, lines = in_child(lambda send: live(directory, send))
        begun = step_of.get(json.loads(lines.readline()), -1)
        found.append([reported, begun])
        first = lines.readline()
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sent = [json.loads(line) for line in (first, *lines) if line.endswith("\n")]
        reported = step_of.get(sent[-1], -1) if sent else begun
    print(json.dumps(found[1:]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
