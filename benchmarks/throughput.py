"""Training speed side by side: this project, stock Keras layers with and without oneDNN, PyTorch eager and compiled.

    python benchmarks/throughput.py [--rounds 15] [--batch 64] [--nets resnet34 resnet50]

Each contender lives in a process of its own, which waits while another one works. They take turns, round after round,
so that a machine whose speed drifts hits all alike. Prints a table and saves it as results/throughput.csv and .md, with
what else was measured (an epoch through fit, the input pipeline) below it. PyTorch is left out where it is not
installed. Needs no images.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CONTENDERS = {  # and the environment of each
    "this project": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "stock Keras, oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "stock Keras, no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
    "PyTorch, channels_last": {},
    "PyTorch, torch.compile, fused Adam": {},
}
EPOCH_BATCHES = 128  # half an epoch of cats_vs_dogs


def example_batch(batch):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.random((batch, 32, 32, 3), dtype="float32"), rng.integers(0, 2, batch)


def torch_steps(net, batch, compiled):
    """A function that makes n training steps in PyTorch (channels_last, Adam)."""
    import torch
    from reference_torch import Net

    images, labels = example_batch(batch)
    model = Net(int(net[-2:]), 2, "none" if net.startswith("plain") else "projection").train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=compiled)
    if compiled:
        model = torch.compile(model)
    images = torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(labels)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return steps, {}


def keras_steps(net, batch, stock):
    """A function that makes n bare training steps, and {"epoch": one through fit, "batches": its input alone}."""
    import keras
    import numpy as np
    import resnet_helpers as rh
    import tensorflow as tf

    if stock:  # the same net from Keras's own layers and optimiser, padded as the paper's
        rh.Conv2D, rh.OPTIMIZERS["adam"] = stock_conv, keras.optimizers.Adam
    config = rh.make_config(net, "full", train_images=EPOCH_BATCHES * batch, batch_size=batch)
    model = rh.build_from_config(config, 2)
    images, labels = map(tf.constant, example_batch(batch))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(images, labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    def steps(count):
        for _ in range(count):
            float(step())

    pixels = np.random.default_rng(0).integers(0, 256, (EPOCH_BATCHES * batch, 32, 32, 3), dtype="uint8")
    data = rh.Batches(pixels, np.arange(len(pixels)) % 2, batch, (0, 0))

    def epoch():
        model.fit(data, shuffle=False, verbose=0)

    def batches():
        for index in range(EPOCH_BATCHES):
            data[index]

    return steps, {"epoch": epoch, "batches": batches}


def stock_conv(filters, kernel_size, strides, name, **options):
    import keras

    def apply(x):
        conv = keras.layers.Conv2D(filters, kernel_size, strides, name=name, **{**options, "padding": "valid"})
        pad = kernel_size // 2
        return conv(keras.layers.ZeroPadding2D(pad)(x) if pad else x)

    return apply


def peak_gflops():
    """The processor's own measured peak: a large matrix product, in 10^9 operations a second."""
    import numpy as np

    a = np.random.default_rng(0).random((3000, 3000), dtype="float32")
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 3000**3 / min(times) / 1e9


def worker(contender, net, batch):
    """Build, warm up, then answer each line on standard input with seconds, as JSON lines."""
    start = time.perf_counter()
    if contender.startswith("PyTorch"):
        steps, named = torch_steps(net, batch, "compile" in contender)
    else:
        steps, named = keras_steps(net, batch, stock=contender.startswith("stock"))
    steps(3)
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in map(str.strip, sys.stdin):
        start = time.perf_counter()
        named[line]() if line in named else steps(int(line))
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
        print(json.dumps([seconds, memory]), flush=True)


def ask(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("A contender ended early; run it alone with --worker to see why.")
    return json.loads(answer)


def measure(net, batch, rounds, steps):
    """Rows of the table for one net, and a line on what else was measured."""
    import pandas as pd
    import resnet_helpers as rh

    processes, times, memory, epochs, inputs = {}, {}, {}, [], []
    for name, environment in CONTENDERS.items():
        if name.startswith("PyTorch") and importlib.util.find_spec("torch") is None:
            print("PyTorch is not installed: left out")
            continue
        command = [sys.executable, __file__, "--worker", name, "--nets", net, "--batch", str(batch)]
        processes[name] = subprocess.Popen(command, env={**os.environ, **environment}, text=True, stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        print(f"{net}: {name} ready after {json.loads(processes[name].stdout.readline()):.0f} s", flush=True)
        times[name] = []
    for number in range(1, rounds + 1):
        for name, process in processes.items():
            seconds, memory[name] = ask(process, steps)
            times[name].append(seconds / steps)
        print(f"{net}: round {number}/{rounds}", end="\r", flush=True)
    ours = next(iter(CONTENDERS))
    first = ask(processes[ours], "epoch")[0]
    for _ in range(3):
        bare = ask(processes[ours], EPOCH_BATCHES)[0]
        whole, memory[ours] = ask(processes[ours], "epoch")
        epochs.append(whole / bare)
        inputs.append(ask(processes[ours], "batches")[0] / bare)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    slower, share = statistics.median(epochs), statistics.median(inputs)
    # Forward and two backward products; those that only meet padding count too, though this project skips some.
    kernels = [layer for layer in rh.create_model(net).layers if hasattr(layer, "kernel")]
    multiply_adds = sum(math.prod([*layer.kernel.shape, *layer.output.shape[1:-1]]) for layer in kernels)
    work = 3 * 2 * multiply_adds * batch / 1e9
    peak = peak_gflops()
    rows = []
    for name in times:
        median = statistics.median(times[name])
        ratio = statistics.median(other / own for own, other in zip(times[ours], times[name]))
        rows.append({"net": rh.display_name(net), "contender": name, "images per second": round(batch / median),
                     "this project is faster by": f"{ratio:.2f}", "share of peak": f"{work / median / peak:.0%}",
                     "peak memory, GB": f"{memory[name]:.1f}"})
    notes = (f"{rh.display_name(net)}: {EPOCH_BATCHES} batches through `fit` take {slower:.2f} times as long as bare "
             "steps, "
             f"the first time {first - slower * bare:.0f} s more; making the batches takes {share:.1%} of their time. "
             f"Peak of the processor: {peak:.0f} x 10^9 operations a second.")
    return pd.DataFrame(rows), notes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["resnet34", "resnet50"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps a contender makes in its turn")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.nets[0], options.batch)
    import pandas as pd
    import resnet_helpers as rh

    tables, notes = zip(*[measure(net, options.batch, options.rounds, options.steps) for net in options.nets])
    table = pd.concat(tables).set_index("net")
    notes = [f"{platform.machine()}, {os.cpu_count()} threads, batch {options.batch}, {options.rounds} rounds of "
             f"{options.steps} steps, medians.", *notes]
    print(f"\n{table.to_string()}\n")
    print(*notes, sep="\n")
    table.to_csv(rh.RESULTS / "throughput.csv")
    (rh.RESULTS / "throughput.md").write_text("\n".join([table.to_markdown(disable_numparse=True), "", *notes, ""]))


if __name__ == "__main__":
    main()
