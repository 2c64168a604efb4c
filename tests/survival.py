"""What training must survive, tested by really doing it; takes some minutes: python tests/survival.py

Prints what each trial did and one closing line; the exit status is 1 if a trial failed.
"""

import contextlib
import http.server
import importlib.util
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy as np
from training_runs import ROOT, SMALL, add_small_nets, finish, outcome, start, wait_for, write_images

sys.path.insert(0, str(ROOT))
import resnet_helpers as rh  # noqa: E402

SEED = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(1000)
EPOCHS = 30  # enough that no run ends before its kill


class Skipped(Exception):
    pass


def say(text):
    """Print past what the trials' own training prints, which is not shown."""
    print(f"  {text}", file=sys.__stdout__, flush=True)


def train_here(folder, **changes):
    return rh.train_run(rh.make_config(**{**SMALL, **changes}), folder)


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_raises(kind, text, action):
    try:
        action()
    except kind as error:
        assert text in str(error), f"the message lacks {text!r}: {error}"
        say(f"{kind.__name__}: {error}")
    else:
        raise AssertionError(f"no {kind.__name__}")


def killed_at_ten_moments(folder):
    """Kill -9, by turns at a random moment and while the checkpoint is being written; then finish the run."""
    began, times = time.monotonic(), []
    whole = rh.train_run(rh.make_config(**{**SMALL, "epochs": EPOCHS}), folder / "whole",
                         on_epoch=lambda run: times.append(time.monotonic() - began))
    startup, epoch = times[0] + 8, float(np.median(np.diff(times)))  # 8 s for the imports
    cut, dice, saving = folder / "cut", random.Random(SEED), 0
    checkpoint = cut / "resnet10-seed0.ckpt"
    for kill in range(10):
        with start(cut, {"epochs": EPOCHS}) as process:
            partial, epochs = cut / f".resnet10-seed0.ckpt.{process.pid}", dice.randrange(4) if kill else 0
            for _ in range(epochs):
                wait_for(process, "min left")
            if kill % 2:
                while not partial.exists() and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(dice.uniform(0, 0.2))
            else:
                time.sleep(dice.uniform(0, epoch if epochs else startup))
            assert process.poll() is None, "the run ended before its kill"
            process.kill()
        size = partial.stat().st_size if partial.exists() else 0
        saving += size > 0
        try:
            with np.load(checkpoint) as file:
                done = len(json.loads(str(file["run"]))["history"]["loss"])
        except FileNotFoundError:
            done = 0
        say(f"kill {kill + 1}: {done} of {EPOCHS} epochs saved"
              + (f", in the middle of writing a checkpoint ({size / 1e6:.0f} MB of it there)" if size else ""))
    finish(start(cut, {"epochs": EPOCHS}))
    assert file_names(cut) == ["resnet10-seed0.json"], file_names(cut)
    assert outcome(train_here(cut, epochs=EPOCHS)) == outcome(whole)
    say(f"then finished: the same history to the last digit; {saving} kills came while saving")


def killed_on_other_backends(folder):
    """A run on JAX and one on PyTorch, killed after the first epoch, end as they do uninterrupted."""
    backends = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
    if not backends:
        raise Skipped("neither JAX nor PyTorch is installed")
    changes = {"train_images": 24, "val_images": 16, "batch_size": 16}
    for backend in backends:
        env, runs = {"KERAS_BACKEND": backend}, []
        finish(start(folder / f"{backend}-whole", changes, env=env))
        with start(folder / backend, changes, env=env) as process:
            wait_for(process, "epoch 2/2")
            process.kill()
        assert "going on after epoch" in finish(start(folder / backend, changes, env=env))
        for name in (f"{backend}-whole", backend):
            assert file_names(folder / name) == ["resnet10-seed0.json"]
            runs.append(outcome(rh.read_run(folder / name / "resnet10-seed0.json")))
        assert runs[0] == runs[1]
        say(f"{backend}: the same history to the last digit")


def two_processes_one_folder(folder):
    """Two runs at once in one folder end as each does alone."""
    seeds = (0, 1)
    alone = [outcome(train_here(folder / "alone", seed=seed)) for seed in seeds]
    for process in [start(folder / "shared", {"seed": seed}) for seed in seeds]:
        finish(process)
    assert file_names(folder / "shared") == [f"resnet10-seed{seed}.json" for seed in seeds]
    assert [outcome(train_here(folder / "shared", seed=seed)) for seed in seeds] == alone
    assert rh.read_runs(folder / "shared").seed.nunique() == 2
    say("both finished with the history that each has alone")


def disk_full(folder):
    """A file system with room for one checkpoint and not for the next, which is then made larger."""
    small = folder / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(small)], capture_output=True,
                           text=True, check=False)
    if mount.returncode:
        raise Skipped(f"no small file system can be mounted here: {mount.stderr.strip()}")
    try:
        process = start(small)
        printed = process.communicate()[0]
        assert process.returncode and "No space left on device" in printed, printed
        say(next(line for line in printed.splitlines() if line.startswith("OSError")))
        assert file_names(small) == ["resnet10-seed0.ckpt"], file_names(small)
        subprocess.run(["mount", "-o", "remount,size=400m", str(small)], check=True)
        assert "going on after epoch 1" in finish(start(small))
        assert outcome(train_here(small)) == outcome(train_here(folder / "whole"))
        say("with more room it went on after epoch 1 to the right history")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def flipped_bits(folder):
    """One bit flipped in a copy: a checkpoint is set aside or restored exactly, a results file refused."""
    with start(folder, {"epochs": 3}) as process:
        wait_for(process, "epoch 2/3")
        process.kill()
    checkpoint, dice = folder / "resnet10-seed0.ckpt", random.Random(SEED)
    content, config = checkpoint.read_bytes(), rh.make_config(**{**SMALL, "epochs": 3})
    model = rh.build_from_config(config, 2)
    model.optimizer.build(model.trainable_variables)

    def restore():
        run = {"config": config, "status": "finished", "history": {key: [] for key in rh.HISTORY},
               "environment": rh.environment(rh.load_data())}
        recorder = rh._Recorder(run, checkpoint.with_suffix(".json"), None, None)
        recorder.set_model(model)
        return recorder.restore(), [*map(rh.keras.ops.convert_to_numpy, recorder._state())]

    epochs, right = restore()
    assert epochs, "the kill came before the first checkpoint"
    aside = 0
    for flip in range(24):
        end = 100_000 if flip % 2 else 0  # by turns anywhere, and in the table of contents at the end
        place = dice.randrange(len(content) - end if end else 0, len(content))
        for variable, value in zip([*model.variables, *model.optimizer.variables], right):
            variable.assign(value)
        checkpoint.write_bytes(damage(content, place, 1 << dice.randrange(8)))
        restored, state = restore()
        assert restored in (0, epochs)
        assert all(np.array_equal(a, b) for a, b in zip(right, state)), f"wrong weights, byte {place}"
        aside += restored == 0
    train_here(folder / "results")
    results = folder / "results" / "resnet10-seed0.json"
    content = results.read_bytes()
    for _ in range(200):
        results.write_bytes(damage(content, dice.randrange(len(content)), 1 << dice.randrange(8)))
        try:
            assert rh.read_run(results) == json.loads(content), "a damaged results file was read"
        except ValueError as error:
            assert str(results) in str(error)
    say(f"{aside} of 24 damaged checkpoints set aside, the others whole; 200 damaged results files refused")


def damage(content, place, mask):
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


@contextlib.contextmanager
def own_data(folder):
    """Let the helper look for prepared data sets in `folder` and nowhere else."""
    before = dict(os.environ)
    os.environ.update(TFDS_DATA_DIR=str(folder), RESNET_CACHE=str(folder / "cache"))
    del os.environ["RESNET_DATA"]
    rh.load_data.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        rh.load_data.cache_clear()


def damaged_record(folder):
    """A prepared data set with some bytes changed in the middle of its records."""
    with own_data(folder):
        rh._store_digits(folder)
        [records] = folder.glob("*/*/*.tfrecord*")
        whole = records.read_bytes()
        records.write_bytes(damage(whole, len(whole) // 2, 255))
        check_raises(ValueError, "damaged record", lambda: rh.load_data(rh.DIGITS))
        assert not list(folder.glob("cache/*"))
        records.write_bytes(whole)
        assert len(rh.load_data(rh.DIGITS).train_images) == 1_258
        say("with the record put right, all images are read")


class HalfAFile(http.server.BaseHTTPRequestHandler):
    """Promises two megabytes and hangs up after one."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", "2000000")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(bytes(1_000_000))

    def log_message(self, *_):
        pass


def network_gone(folder):
    """The network goes away in the middle of the download; what was prepared before is still there, and whole."""
    with own_data(folder), http.server.ThreadingHTTPServer(("127.0.0.1", 0), HalfAFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rh._store_digits(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        url = f"http://127.0.0.1:{server.server_port}/cats.zip"
        for _ in range(2):
            check_raises(RuntimeError, "broke off", lambda: rh.prepare_dataset("full", url=url))
        server.shutdown()
        assert all(path.read_bytes() == content for path, content in before.items())
        assert not rh._prepared("cats_vs_dogs")
        assert len(rh.load_data(rh.DIGITS).train_images) == 1_258
        say("what was prepared before is unchanged")


TRIALS = (killed_at_ten_moments, two_processes_one_folder, disk_full, flipped_bits, damaged_record, network_gone,
          killed_on_other_backends)


def main():
    began, count = time.monotonic(), {"passed": 0, "skipped": 0, "FAILED": 0}
    print(f"The kills and the damage are drawn with seed {SEED}; to repeat them: python tests/survival.py {SEED}")
    add_small_nets(rh)
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        os.environ["RESNET_DATA"] = str(write_images(place / "images.npz"))
        for trial in TRIALS:
            print(f"{trial.__name__}: {trial.__doc__}", flush=True)
            (place / trial.__name__).mkdir()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    trial(place / trial.__name__)
                result = "passed"
            except Skipped as reason:
                result = "skipped"
                say(reason)
            except Exception:
                result = "FAILED"
                traceback.print_exc(file=sys.stdout)
            count[result] += 1
            print(f"  {result} ({time.monotonic() - began:.0f} s so far)", flush=True)
    summary = ", ".join(f"{number} {result}" for result, number in count.items())
    print(f"Survival: {summary}, in {time.monotonic() - began:.0f} s.")
    return int(count["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
