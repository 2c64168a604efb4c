"""Small runs on made-up images, in this process or in another one, for test_training.py.

As a program it trains one run:
python tests/training_runs.py FOLDER '{"epochs": 2}' '{"without": ["tensorflow"]}'
"""

import base64
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The last batch of each split is a smaller one.
SMALL = {
    "model": "resnet10",
    "profile": "test",
    "epochs": 2,
    "batch_size": 32,
    "train_images": 80,
    "val_images": 40,
}


def write_images(folder):
    """Write a file as load_data does into a new folder; return variables that let it be found.

    The images are noise, in which the second class is a little brighter.
    """
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["cat", "dog"])}
    for split, count in (("train", 96), ("val", 48)):
        labels = rng.integers(0, 2, count)
        noise = rng.integers(0, 160, (count, 32, 32, 3)) + 60 * labels[:, None, None, None]
        arrays |= {f"{split}_images": noise.astype("uint8"), f"{split}_labels": labels}
    folder.mkdir()
    np.savez(folder / "cats_vs_dogs-32px-made_up.npz", **arrays)
    return {"RESNET_DATA": str(folder), "TFDS_DATA_DIR": str(folder / "nothing_prepared")}


def add_small_nets(rh, setitem=dict.__setitem__):
    """Make plain10 and resnet10 known, with one unit per stage, and SMALL the profile "test".

    The processes that train_runs starts know nothing of it.
    """
    setitem(
        rh.PROFILES, "test", {key: SMALL[key] for key in SMALL if key not in ("model", "profile")}
    )
    setitem(rh.DEPTHS, 10, rh.DEPTHS[18] | {"units_per_block": [1, 1, 1, 1]})
    for name in ("plain10", "resnet10"):
        setitem(rh.MODELS, name, 10)


def predictions(run):
    """A run's answers for the validation images, unpacked."""
    return np.frombuffer(zlib.decompress(base64.b64decode(run["val_predictions"])), "uint8")


def outcome(run):
    """What must be the same to the last digit after every cut: all but times and places."""
    history = {key: values for key, values in run["history"].items() if key != "seconds"}
    rest = {
        key: value
        for key, value in run.items()
        if key not in ("history", "environment", "earlier_environments")
    }
    return {**rest, **history}


def start(folder, changes=None, limit=300, env=None, **options):
    """Train in another process, killed after `limit` seconds; `options` are those of `main`."""
    arguments = [str(folder), json.dumps(changes or {}), json.dumps(options)]
    process = subprocess.Popen(
        [sys.executable, "-u", __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    return process


def wait_for(process, text):
    """Read what a process prints until a line has `text` in it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"It ended without {text!r}:\n{''.join(lines)}")


def finish(process):
    """Wait for the end of a process and return what it printed."""
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return printed


def main(folder, changes, options):
    """Options: modules to do `without`, and a file of `weights` to take the loss with."""
    for name in options.get("without", ()):
        sys.modules[name] = None  # an import of it now fails
    sys.path.insert(0, str(ROOT))
    import resnet_helpers as rh

    add_small_nets(rh)
    config = rh.make_config(**{**SMALL, **changes})
    if "weights" in options:
        print(json.dumps(losses(rh, options["weights"])), flush=True)
    print("begins", flush=True)
    rh.train_run(config, folder)


def losses(rh, weights):
    """Loss of a net with given weights on given images, as in validation and as in training."""
    data = rh.load_data()
    model = rh.build_from_config(rh.make_config("resnet18", "test"), 2)
    with np.load(weights) as file:
        model.set_weights([file[str(i)] for i in range(len(file.files))])
    images, labels = rh.normalize(data.val_images), data.val_labels
    return [
        float(model.loss(labels, model(images, training=training))) for training in (False, True)
    ]


def write_slowly(path):
    """In a process of a pool: a file that takes two seconds to be written."""
    import resnet_helpers as rh

    def write(partial):
        partial.write_text("half")
        time.sleep(2)
        partial.write_text("whole")

    rh.write_atomically(path, write)


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
