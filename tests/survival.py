"""Trials that are too long for every test run: kill -9, a full disk, flipped bits, a cluster that loses a worker.

    .venv/bin/pip install "dask[distributed]"
    .venv/bin/python tests/survival.py           # about ten minutes; the full disk needs root on Linux

Each trial must end in the history of a run that nothing ever happened to, to the last digit.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from training_runs import ROOT, finish, outcome, write_images

sys.path.insert(0, str(ROOT))
import resnet_helpers as rh  # noqa: E402

TINY = {"profile": "quick", "train_images": 80, "val_images": 40, "batch_size": 16}


def start(config, folder):
    command = [sys.executable, str(ROOT / "resnet_helpers.py"), json.dumps(config), json.dumps({"folder": str(folder)})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(config, folder):
    finish(start(config, folder))
    return outcome(rh.read_run(rh.run_path(config, folder)))


def epochs(path):
    return len(rh._table_so_far(path, []))


def wait_until(condition, limit=120):
    end = time.time() + limit
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def ten_kills(folder):
    config = rh.make_config("resnet20", epochs=40, **TINY)
    path, expected = rh.run_path(config, folder / "killed"), finished(config, folder / "whole")
    for kill in range(10):
        before = epochs(path)
        process = start(config, folder / "killed")
        wait_until(lambda: epochs(path) > before)  # noqa: B023
        time.sleep(random.uniform(0, 0.8))
        process.kill()
        process.wait()
        print(f"  kill {kill + 1} after epoch {epochs(path)} of {config['epochs']}")
    assert not path.exists(), "it was finished before the last kill"
    assert finished(config, folder / "killed") == expected
    left = sorted(each.name for each in path.parent.iterdir())
    assert left == [path.name], left


def full_disk(folder):
    if os.name != "posix" or os.geteuid():
        return print("  skipped: mounting a small file system needs root")
    config, place = rh.make_config("resnet20", epochs=3, **TINY), folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", place], check=True)  # one checkpoint, not two
    try:
        process = start(config, place)
        said = process.communicate()[0]
        assert process.returncode == 1 and "No space left on device" in said and "Cannot write" in said, said
        assert epochs(rh.run_path(config, place)) == 1
        print("  stopped after epoch 1:", said.strip().splitlines()[-1][:100].replace(str(folder), "..."))
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        assert finished(config, place) == finished(config, folder / "large")
    finally:
        subprocess.run(["umount", place], check=True)


def flipped_bits(folder, count=60):
    config = rh.make_config("resnet20", epochs=500, **TINY)
    path, process = rh.run_path(config, folder), start(config, folder)
    wait_until(lambda: epochs(path) > 0)
    process.kill()
    process.wait()
    checkpoint = path.with_suffix(".checkpoint.npz")
    whole, data = checkpoint.read_bytes(), rh.load_data()
    model = rh.build_from_config(config, 2)
    model.optimizer.build(model.trainable_variables)
    state = [*model.variables, *model.optimizer.variables]
    run = {"config": config, "environment": rh.environment(data)}
    with np.load(checkpoint) as file:
        expected = [file[str(i)] for i in range(len(state))]
    refused = 0
    for _ in range(count):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            rh._restore(checkpoint, run, state)
            assert all(np.array_equal(np.array(a), b) for a, b in zip(state, expected)), "wrong weights were taken"
        except ValueError as error:
            assert "is damaged" in str(error), error
            refused += 1
    print(f"  {refused} of {count} refused, {count - refused} were harmless")
    assert refused > count / 2


def cluster_loses_a_worker(folder):
    import dask.distributed

    configs = [rh.make_config(name, epochs=12, **TINY) for name in ("resnet20", "plain20", "resnet32")]
    expected = [finished(config, folder / "alone") for config in configs]
    first = rh.run_path(configs[0], folder / "cluster")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with dask.distributed.LocalCluster(**options) as workers, dask.distributed.Client(workers) as client:
        killer = subprocess.Popen([sys.executable, __file__, "--kill-parent-of", str(first)])
        rh.train_runs(configs, client.get_executor(pure=False), folder=folder / "cluster")
        assert killer.wait() == 0
    assert [outcome(rh.read_run(rh.run_path(config, folder / "cluster"))) for config in configs] == expected


def kill_parent_of(path):
    """After epoch 3 of the run at `path`, kill the worker that started its process."""
    wait_until(lambda: epochs(path) >= 3)
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        words = (process / "cmdline").read_bytes().decode().split("\0")
        if not (len(words) > 2 and words[1].endswith("resnet_helpers.py")):
            continue
        if rh.run_path(json.loads(words[2]), path.parent) == path:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(parent, signal.SIGKILL)
            return print(f"  worker killed after epoch {epochs(path)} of its run")
    raise AssertionError("no process of this run was found")


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        os.environ |= write_images(folder / "images") | {"RESNET_THREADS": "1"}
        for trial in (ten_kills, full_disk, flipped_bits, cluster_loses_a_worker):
            print(trial.__name__.replace("_", " "), flush=True)
            (folder / trial.__name__).mkdir()
            trial(folder / trial.__name__)
    print("All survived.")


if __name__ == "__main__":
    if "--kill-parent-of" in sys.argv:
        kill_parent_of(pathlib.Path(sys.argv[-1]))
    else:
        main()
