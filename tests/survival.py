"""Trials that are too long for every test run: ten times kill -9, a full disk, flipped bits.

    .venv/bin/python tests/survival.py           # some minutes; the full disk needs root on Linux

Each trial must end in the history of a run that nothing ever happened to, to the last digit.
"""

import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import training_runs
from training_runs import ROOT, SMALL, add_small_nets, finish, outcome, write_images

sys.path.insert(0, str(ROOT))
import resnet_helpers as rh  # noqa: E402


def config_of(changes):
    return rh.make_config(**{**SMALL, **changes})


def finished(changes, folder):
    finish(training_runs.start(folder, changes))
    return outcome(rh.read_run(rh.run_path(config_of(changes), folder)))


def epochs(path):
    try:
        run = rh._saved_run(path)
    except ValueError:  # just being replaced
        run = None
    return len(run["history"]["loss"]) if run else 0


def wait_until(condition, limit=120):
    end = time.time() + limit
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def ten_kills(folder):
    changes = {"epochs": 60}
    path, expected = (
        rh.run_path(config_of(changes), folder / "killed"),
        finished(changes, folder / "whole"),
    )
    for kill in range(10):
        before = epochs(path)
        process = training_runs.start(folder / "killed", changes)
        wait_until(lambda: epochs(path) > before)  # noqa: B023
        time.sleep(random.uniform(0, 0.8))
        process.kill()
        process.wait()
        print(f"  kill {kill + 1} after epoch {epochs(path)} of {changes['epochs']}")
    assert not path.exists(), "it was finished before the last kill"
    assert finished(changes, folder / "killed") == expected
    left = sorted(each.name for each in path.parent.iterdir())
    assert left == [path.name], left


def full_disk(folder):
    if os.name != "posix" or os.geteuid():
        return print("  skipped: mounting a small file system needs root")
    changes, place = {"epochs": 3}, folder / "small"
    path = rh.run_path(config_of(changes), place)
    place.mkdir()
    size = "size=90m"  # one checkpoint of ResNet-10, not two
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", place], check=True)
    try:
        process = training_runs.start(place, changes)
        said = process.communicate()[0]
        assert process.returncode == 1 and "No space left on device" in said, said
        assert "Cannot write" in said and epochs(path) == 1, said
        print("  stopped after epoch 1:", said.strip().splitlines()[-1][:60], "...")
        subprocess.run(["mount", "-o", "remount,size=500m", place], check=True)
        assert finished(changes, place) == finished(changes, folder / "large")
    finally:
        subprocess.run(["umount", place], check=True)


def flipped_bits(folder, count=60):
    changes = {"epochs": 500}
    config = config_of(changes)
    path, process = rh.run_path(config, folder), training_runs.start(folder, changes)
    wait_until(lambda: epochs(path) > 0)
    process.kill()
    process.wait()
    checkpoint = path.with_suffix(".checkpoint.npz")
    whole, data = checkpoint.read_bytes(), rh.load_data()
    state = rh._state(rh.build_from_config(config, 2))
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
            equal = [np.array_equal(np.array(a), b) for a, b in zip(state, expected)]
            assert all(equal), "wrong weights were taken"
        except ValueError as error:
            assert "is damaged" in str(error), error
            refused += 1
    print(f"  {refused} of {count} refused, {count - refused} were harmless")
    assert refused > count / 2


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        os.environ |= write_images(folder / "images") | {"TF_NUM_INTRAOP_THREADS": "1"}
        add_small_nets(rh)
        for trial in (ten_kills, full_disk, flipped_bits):
            print(trial.__name__.replace("_", " "), flush=True)
            (folder / trial.__name__).mkdir()
            trial(folder / trial.__name__)
    print("All survived.")


if __name__ == "__main__":
    main()
