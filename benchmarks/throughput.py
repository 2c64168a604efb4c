"""Training speed side by side: this project, stock Keras layers with and without oneDNN, PyTorch.

    python benchmarks/throughput.py [--rounds 15] [--batch 64] [--nets resnet34] [--avx2] [--save]

PyTorch comes eager and compiled; it is left out where it is not installed. Where the processor has
instructions for bfloat16, this project and PyTorch come in that precision too (Keras's policy
"mixed_bfloat16", autocast). Each contender lives in a process of its own, which waits while another
one works. They take turns, round after round, so that a machine whose speed drifts hits all alike.

Prints a table and writes it into build/ as throughput.csv and throughput.md, with what else was
measured (an epoch through fit, the input pipeline) and the processor below it. With --save it is
written as results/throughput-<kind>.csv and .md instead, where the kind is avx512, avx2 or the
machine's name. With --avx2 all contenders are held to AVX2. Needs no images.
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
    "this project, mixed_bfloat16": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "stock Keras, oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "stock Keras, no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
    "PyTorch, channels_last": {},
    "PyTorch, torch.compile, fused Adam": {},
    "PyTorch, bfloat16 autocast": {},
    "PyTorch, torch.compile, bfloat16 autocast, fused Adam": {},
}
EPOCH_BATCHES = 128  # half an epoch of cats_vs_dogs
# With --avx2: what holds oneDNN, PyTorch's own kernels, its MKL and NumPy to AVX2.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
             # What was compiled for other instructions would be taken from here, and fail.
             "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "compiled-for-avx2")}


# ---- the processor ----


def cpu_info(key):
    """The first value of `key` in /proc/cpuinfo; "" where there is none."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key)
    return next(values, "")


def held_to_avx2():
    return AVX2_ONLY.items() <= os.environ.items()


def cpu_flags():
    """The instructions that the contenders may use."""
    flags = set(cpu_info("flags").split())
    if held_to_avx2():
        flags = {flag for flag in flags if not flag.startswith(("avx512", "amx"))}
    return flags


def processor():
    """The processor's name, and which of the instructions that matter here it has."""
    flags = cpu_flags()
    known = {"AVX2": "avx2", "AVX-512": "avx512f", "AMX": "amx_tile"}
    has = [name for name, flag in known.items() if flag in flags]
    name = cpu_info("model name") or platform.processor() or platform.machine()
    if held_to_avx2():
        has.append("held to it")
    return f"{name} ({', '.join(has)})" if has else name


def kind():
    """What the saved files are named after."""
    flags = cpu_flags()
    if "avx512f" in flags:
        return "avx512"
    return "avx2" if "avx2" in flags else platform.machine()


def contenders():
    """Those that make sense on this machine; says which do not."""
    names = list(CONTENDERS)
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: left out.")
        names = [name for name in names if not name.startswith("PyTorch")]
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        print("What uses bfloat16 is left out: there are no instructions for it")
        print("(avx512_bf16, amx_bf16), without which it is several times slower than float32.")
        names = [name for name in names if "bfloat16" not in name]
    return names


# ---- what a contender does ----


def example_batch(batch):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.random((batch, 32, 32, 3), dtype="float32"), rng.integers(0, 2, batch)


def torch_steps(net, batch, contender):
    """A function that makes n training steps in PyTorch (channels_last, Adam)."""
    import torch
    from reference_torch import Net

    images, labels = example_batch(batch)
    model = Net(int(net[-2:]), 2, "none" if net.startswith("plain") else "projection").train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused="fused Adam" in contender)
    if "torch.compile" in contender:
        model = torch.compile(model)
    images = torch.tensor(images).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(labels)
    bfloat16 = "bfloat16" in contender

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    return steps, {}


def prepare_keras(contender):
    """Set the precision; the stock net is the same one from Keras's own layers and optimiser."""
    import keras
    import resnet_helpers as rh

    if "bfloat16" in contender:
        keras.config.set_dtype_policy("mixed_bfloat16")
    if "stock" in contender:
        rh.Conv2D = stock_conv
        rh.BatchNormalization = keras.layers.BatchNormalization
        rh.Adam = keras.optimizers.Adam


def keras_steps(net, batch, contender):
    """A function that makes n bare training steps, and others by name.

    These are "epoch", one through fit, and "batches", its input alone.
    """
    import numpy as np
    import resnet_helpers as rh
    import tensorflow as tf

    prepare_keras(contender)
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

    shape = (EPOCH_BATCHES * batch, 32, 32, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype="uint8")
    data = rh.Batches(pixels, np.arange(len(pixels)) % 2, batch, (0, 0))

    def epoch():
        model.fit(data, shuffle=False, verbose=0)

    def batches():
        for index in range(EPOCH_BATCHES):
            data[index]

    return steps, {"epoch": epoch, "batches": batches}


def stock_conv(filters, kernel_size, strides, name, **options):
    """In place of rh.Conv2D: Keras's own, padded as the paper's."""
    import keras

    options["padding"] = "valid"
    pad = kernel_size // 2

    def apply(x):
        conv = keras.layers.Conv2D(filters, kernel_size, strides, name=name, **options)
        return conv(keras.layers.ZeroPadding2D(pad)(x) if pad else x)

    return apply


# ---- measuring ----


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
        steps, named = torch_steps(net, batch, contender)
    else:
        steps, named = keras_steps(net, batch, contender)
    steps(3)
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in map(str.strip, sys.stdin):
        start = time.perf_counter()
        if line in named:
            named[line]()
        else:
            steps(int(line))
        seconds = time.perf_counter() - start
        unit = 2**30 if sys.platform == "darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(json.dumps([seconds, memory]), flush=True)


def launch(name, net, batch):
    """Start a contender's process and wait until it is ready."""
    command = [sys.executable, __file__, "--worker", name, "--nets", net, "--batch", str(batch)]
    process = subprocess.Popen(
        command, env={**os.environ, **CONTENDERS[name]}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    print(f"{net}: {name} ready after {answer(process):.0f} s", flush=True)
    return process


def answer(process):
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("A contender ended early; run it alone with --worker to see why.")
    return json.loads(line)


def ask(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return answer(process)


def take_turns(net, processes, rounds, steps):
    """Seconds per step, a list per contender."""
    times = {name: [] for name in processes}
    for number in range(1, rounds + 1):
        for name, process in processes.items():
            times[name].append(ask(process, steps)[0] / steps)
        print(f"{net}: round {number}/{rounds}", end="\r", flush=True)
    return times


def time_epochs(process):
    """Three times an epoch through fit, and its input alone, as multiples of its bare steps."""
    first = ask(process, "epoch")[0]
    epochs, inputs = [], []
    for _ in range(3):
        bare = ask(process, EPOCH_BATCHES)[0]
        epochs.append(ask(process, "epoch")[0] / bare)
        inputs.append(ask(process, "batches")[0] / bare)
    slower = statistics.median(epochs)
    return (f"{EPOCH_BATCHES} batches through `fit` take {slower:.2f} times as long as bare steps, "
            f"the first time {first - slower * bare:.0f} s more; "
            f"making the batches takes {statistics.median(inputs):.1%} of their time.")


def gflops_per_step(net, batch):
    """Forward and two backward products, in 10^9 operations.

    Those that only meet padding count too, though this project skips some.
    """
    import resnet_helpers as rh

    kernels = [layer for layer in rh.create_model(net).layers if hasattr(layer, "kernel")]
    shapes = [[*layer.kernel.shape, *layer.output.shape[1:-1]] for layer in kernels]
    return 3 * 2 * sum(map(math.prod, shapes)) * batch / 1e9


def measure(net, options):
    """Rows of the table for one net, and a line on what else was measured."""
    import pandas as pd
    import resnet_helpers as rh

    processes = {name: launch(name, net, options.batch) for name in options.contenders}
    times = take_turns(net, processes, options.rounds, options.steps)
    ours = times[next(iter(CONTENDERS))]
    epochs = time_epochs(processes[next(iter(CONTENDERS))])
    memory = {name: ask(process, 0)[1] for name, process in processes.items()}
    for process in processes.values():
        process.stdin.close()
        process.wait()
    peak = peak_gflops()
    work = gflops_per_step(net, options.batch)
    rows = []
    for name, own in times.items():
        median = statistics.median(own)
        ratio = statistics.median(other / mine for mine, other in zip(ours, own))
        rows.append({
            "net": rh.display_name(net), "contender": name,
            "images per second": round(options.batch / median),
            "this project / contender": f"{ratio:.2f}",
            "share of peak": f"{work / median / peak:.0%}",
            "peak memory, GB": f"{memory[name]:.1f}"})
    peak_note = f"Peak of the processor: {peak:.0f} x 10^9 operations a second, in float32."
    return pd.DataFrame(rows), f"{rh.display_name(net)}: {epochs} {peak_note}"


def write(table, notes, save):
    """Into build/; a table of results/ only if asked to."""
    path = ROOT / "results" / f"throughput-{kind()}" if save else ROOT / "build" / "throughput"
    path.parent.mkdir(exist_ok=True)
    markdown = table.to_markdown(disable_numparse=True)
    table.to_csv(path.with_suffix(".csv"))
    path.with_suffix(".md").write_text("\n".join([markdown, "", *notes, ""]))
    print(f"\n{table.to_string()}\n")
    print(*notes, sep="\n")
    print(f"Written: {path}.csv and .md")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["resnet34", "resnet50"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps a contender makes in its turn")
    parser.add_argument("--avx2", action="store_true", help="use no younger instructions")
    parser.add_argument("--save", action="store_true", help="into results/, not build/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.nets[0], options.batch)
    if options.avx2:
        os.environ.update(AVX2_ONLY)  # read by libraries that are loaded later
    import joblib
    import pandas as pd

    options.contenders = contenders()
    tables, notes = zip(*[measure(net, options) for net in options.nets])
    setting = (f"{processor()}, {joblib.cpu_count()} threads, batch {options.batch}, "
               f"{options.rounds} rounds of {options.steps} steps, medians.")
    write(pd.concat(tables).set_index("net"), [setting, *notes], options.save)


if __name__ == "__main__":
    main()
