import concurrent.futures
import contextlib
import errno
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import filelock
import keras
import numpy as np
import pytest
import resnet_helpers as rh
from notebook_code import format_percent
from training_runs import (
    ROOT,
    SMALL,
    add_small_nets,
    finish,
    losses,
    outcome,
    predictions,
    start,
    wait_for,
    write_images,
    write_slowly,
)


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory):
    """Small nets, and made-up images in place of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in write_images(tmp_path_factory.mktemp("images") / "decoded").items():
            patch.setenv(name, value)
        add_small_nets(rh, patch.setitem)
        yield


def config(**changes):
    return rh.make_config(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def whole(small_world, tmp_path_factory):
    """Folder and run of an uninterrupted training; tests compare with it and copy from it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, rh.train_run(config(), folder)


def stop_after(epoch, monkeypatch):
    """Interrupt training once an epoch is saved, as the stop button may at any moment."""
    line = rh._epoch_line

    def stop(table, i=-1):
        if len(table) == epoch:
            raise KeyboardInterrupt
        return line(table, i)

    monkeypatch.setattr(rh, "_epoch_line", stop)


@pytest.fixture(scope="module")
def checkpoint(whole, tmp_path_factory):
    """The same run's checkpoint after its first epoch."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        rh.train_run(config(), folder)
    return folder / "resnet10-test-seed0.checkpoint.npz"


def train_and_compare(folder, whole, *left):
    """Train (or go on) in `folder` to the run that was never interrupted; only `left` is left."""
    run = rh.train_run(config(), folder)
    assert outcome(run) == outcome(whole[1])
    assert outcome(rh.read_run(rh.run_path(config(), folder))) == outcome(run)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["resnet10-test-seed0.json", *left]
    )


def flip_bit(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


# -------------------- exact, also after a stop


def test_same_history_after_another_model_and_in_a_fresh_process(whole, tmp_path):
    fresh = start(tmp_path / "fresh")
    rh.train_run(config(model="plain10", seed=1, epochs=1), tmp_path / "other")
    train_and_compare(tmp_path / "again", whole)
    finish(fresh)
    assert outcome(rh.train_run(config(), tmp_path / "fresh")) == outcome(whole[1])
    assert len(whole[1]["history"]["loss"]) == 2 and whole[1]["val_predictions"]


@pytest.mark.parametrize("epoch", (1, 2))
def test_goes_on_exactly_after_kill_9(whole, tmp_path, capsys, epoch):
    with start(tmp_path) as process:
        wait_for(process, "begins" if epoch == 1 else "epoch 1/2")
        process.kill()
    assert not list(tmp_path.glob("*.json"))
    (tmp_path / ".resnet10-test-seed0.json").write_text("what a kill while saving leaves")
    train_and_compare(tmp_path, whole)
    assert ("Going on after epoch 1 of 2" in capsys.readouterr().out) == (epoch == 2)


def test_goes_on_exactly_after_the_stop_button(whole, tmp_path, monkeypatch, capsys):
    fetch = rh.Batches.__getitem__

    def stop(batches, index):
        if batches.seed_and_epoch and (batches.seed_and_epoch[1], index) == (1, 1):
            signal.raise_signal(signal.SIGINT)  # what Jupyter's stop button sends
        return fetch(batches, index)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process started in the background ignores it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rh.Batches, "__getitem__", stop)
            rh.train_run(config(), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    train_and_compare(tmp_path, whole)
    assert "Going on after epoch 1 of 2" in capsys.readouterr().out


def test_learning_rate_rises_for_half_an_epoch_and_ends_at_zero():
    long = config(train_images=16_283, epochs=15, batch_size=64)
    epoch = math.ceil(16_283 / 64)
    optimizer = rh.build_from_config(long, 2).optimizer
    rates = []
    for step in (0, epoch // 4, epoch // 2, epoch // 2 + 1, 8 * epoch, 15 * epoch - 1, 15 * epoch):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert (
        rates[0] == 0
        and rates[1] == pytest.approx(5e-4, rel=0.01)
        and rates[2] == pytest.approx(1e-3)
    )
    assert rates[2] > rates[3] > rates[4] > rates[5] and rates[5:] == pytest.approx(
        [0, 0], abs=1e-8
    )


def test_the_loss_of_guessing_is_kept(whole):
    share = rh.load_data().train_labels[: SMALL["train_images"]].mean()
    guessing = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert whole[1]["environment"]["guessing_loss"] == pytest.approx(guessing)


def test_predictions_are_kept_for_every_validation_image(whole):
    labels = rh.load_data().val_labels[: SMALL["val_images"]]
    assert np.mean(predictions(whole[1]) == labels) == pytest.approx(
        whole[1]["history"]["val_accuracy"][-1]
    )


def test_kept_weights_are_those_of_the_end_and_nothing_else(whole, tmp_path):
    run = rh.train_run(config(), tmp_path, keep_weights=True)
    assert outcome(run) == outcome(whole[1])
    weights = tmp_path / "resnet10-test-seed0.weights.h5"
    model = rh.create_model("resnet10")
    model.load_weights(weights)
    classes = (
        model(rh.normalize(rh.load_data().val_images[: SMALL["val_images"]])).numpy().argmax(-1)
    )
    np.testing.assert_array_equal(classes, predictions(run))
    assert (
        weights.stat().st_size < 1.1 * 4 * model.count_params()
    )  # the optimiser's state would double it at least


@pytest.mark.parametrize("rate", (1e-2, keras.optimizers.schedules.CosineDecay(1e-2, 10)))
def test_adam_equals_keras(rate):
    rng = np.random.default_rng(0)
    start, gradients = (
        rng.uniform(1, 2, (3, 5)).astype("float32"),
        rng.normal(size=(8, 3, 5)).astype("float32"),
    )
    results = []
    for kind in (rh.Adam, keras.optimizers.Adam):
        variable, optimizer = keras.Variable(start), kind(rate)
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        results.append(np.array(variable))
        state = [np.array(v) for v in optimizer.variables]
        results.append(
            np.concatenate([value.ravel() for value in state[2:]])
        )  # without steps and learning rate
    assert np.abs(results[0] - start).min() > 1e-4
    np.testing.assert_allclose(results[0], results[2], rtol=1e-6)
    np.testing.assert_allclose(results[1], results[3], rtol=1e-5, atol=1e-7)


# -------------------- damaged, full, diverged


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(path, **changes):
    """Change entries of a checkpoint, or leave them out (None)."""
    with np.load(path) as file:
        arrays = {**file, **changes}
    with open(path, "wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def make_foreign(path):
    with np.load(path) as file:
        rewrite(path, run=str(file["run"]).replace('"seed": 0', '"seed": 5'))


def drop_last(path):
    with np.load(path) as file:
        rewrite(path, **{str(len(file.files) - 2): None})


def change_environment(path, **changes):
    with np.load(path) as file:
        run = json.loads(str(file["run"]))
    run["environment"] |= changes
    rewrite(path, run=json.dumps(run))


@pytest.fixture(scope="module")
def fresh(small_world):
    """A run that is about to train, and the variables of its network and optimiser."""
    model = rh.build_from_config(config(), 2)
    model.optimizer.build(model.trainable_variables)
    run = {"config": config(), "environment": rh.environment(rh.load_data())}
    return run, [*model.variables, *model.optimizer.variables]


@pytest.mark.parametrize(
    "damage, reason",
    (
        (truncate, "not a zip file"),
        (lambda path: flip_bit(path, 3_000_000), "CRC"),
        (drop_last, "is not a file in the archive"),
        (lambda path: path.write_bytes(b""), "No data left"),
        (lambda path: path.write_text("0" * 999), ""),
    ),
)
def test_a_checkpoint_that_cannot_be_read_is_named_and_changes_nothing(
    fresh, checkpoint, tmp_path, damage, reason
):
    run, state = fresh
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    kept, before = path.read_bytes(), [np.array(variable) for variable in state]
    with pytest.raises(ValueError, match=f"checkpoint.npz is damaged .*{reason}.*Move it away"):
        rh._restore(path, run, state)
    assert path.read_bytes() == kept and all(np.array_equal(a, b) for a, b in zip(before, state))


@pytest.mark.parametrize(
    "change, reason",
    (
        (make_foreign, "seed: 5, wanted 0"),
        (
            lambda path: change_environment(path, device="NVIDIA H100"),
            "device: 'NVIDIA H100', wanted 'CPU",
        ),
        (lambda path: change_environment(path, backend="jax"), "backend: 'jax', wanted 'tensor"),
        (lambda path: change_environment(path, images_crc32=1), "images_crc32: 1, wanted"),
        (lambda path: change_environment(path, labels_crc32=1), "labels_crc32: 1, wanted"),
    ),
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(checkpoint, tmp_path, change, reason):
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    change(path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=f"checkpoint.npz belongs to another run .*{reason}"):
        rh.train_run(config(), tmp_path)
    assert path.read_bytes() == kept


def test_another_number_of_threads_goes_on_and_is_told(whole, checkpoint, tmp_path):
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    change_environment(path, threads=77)
    run = rh.train_run(config(), tmp_path)
    assert [was["threads"] for was in run["earlier_environments"]] == [77] and run["environment"][
        "threads"
    ] != 77
    assert outcome(run) == outcome(whole[1])


def test_an_older_checkpoint_goes_on(whole, checkpoint, tmp_path):
    """From before some entries were there; they have their usual values."""
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    with np.load(path) as file:
        run = json.loads(str(file["run"]))
    for part, keys in (("config", rh.NEWER), ("environment", ("labels_crc32",))):
        run[part] = {key: value for key, value in run[part].items() if key not in keys}
    rewrite(path, run=json.dumps(run))
    assert outcome(rh.train_run(config(), tmp_path)) == outcome(whole[1])


def fail(reason):
    raise ValueError(f"no {reason} allowed")


def test_divergence_is_recorded(whole, tmp_path, monkeypatch):
    residual = rh.run_path(config(), tmp_path)
    residual.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    plain = config(model="plain10")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rh, "normalize", lambda images: np.full(images.shape, np.nan, "float32"))
        stop_after(1, patch)
        rh.train_run(plain, tmp_path)
    path = rh.run_path(plain, tmp_path)
    for _ in range(2):  # it does not go on, since it has diverged; then it is loaded
        run = rh.train_run(plain, tmp_path)
        assert run["status"] == "diverged" and len(run["history"]["loss"]) == 1
    # A fused ReLU may turn NaN into 0, so the training loss alone does not tell.
    assert json.loads(path.read_text(), parse_constant=fail)["history"]["val_loss"] == [None]
    assert sorted(tmp_path.glob("[!.]*")) == [path, residual]
    table = format_percent(rh.ablation_table(rh.read_runs(tmp_path)))
    assert table.plain.item() == table.difference.item() == "diverged"
    assert table.residual.item() == f"{100 * whole[1]['history']['val_accuracy'][-1]:.1f}"


def test_a_learning_rate_that_is_too_high_diverges(tmp_path, capsys):
    assert rh.train_run(config(learning_rate=1e30), tmp_path)["status"] == "diverged"
    assert "0.0 min left" in capsys.readouterr().out.splitlines()[-1]


def test_a_finished_run_is_loaded_and_nothing_is_deleted(whole, tmp_path, monkeypatch):
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    (tmp_path / "resnet10-test-seed0.checkpoint.npz").write_text(
        "of a training that somebody wants to go on with"
    )
    (tmp_path / ".resnet10-test-seed0.json").write_text(
        "of another process, which is just writing"
    )
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(rh, "load_data", lambda *_: fail("training"))
    assert outcome(rh.train_run(config(), tmp_path)) == outcome(whole[1])
    assert sorted(tmp_path.iterdir()) == before
    path.rename(rh.run_path(config(epochs=3), tmp_path))
    with pytest.raises(
        ValueError,
        match=r"resnet10-test-epochs_3-seed0\.json belongs to another run "
        r"\(epochs: 2, wanted 3\)",
    ):
        rh.train_run(config(epochs=3), tmp_path)


@pytest.mark.parametrize(
    "damage", (truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("[]"))
)
def test_a_damaged_results_file_is_named_and_kept(whole, tmp_path, damage):
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    damage(path)
    damaged = path.read_bytes()
    for read in (lambda: rh.train_run(config(), tmp_path), lambda: rh.read_runs(tmp_path)):
        with pytest.raises(ValueError, match=r"resnet10-test-seed0\.json is damaged"):
            read()
    assert path.read_bytes() == damaged


def test_an_unwritable_folder_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        rh.train_runs([config(model="resnet20")], folder=tmp_path / "file" / "results")


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    def full(file):
        if list(tmp_path.glob("[!.]*.npz")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reason = r"\(\[Errno 28\] No space left on device\)"
        with pytest.raises(OSError, match=rf"Cannot write .*\.npz {reason}. What was saved"):
            rh.train_run(config(), tmp_path)
    assert not list(tmp_path.glob(".*.npz")), "a partial file is left"
    with np.load(tmp_path / "resnet10-test-seed0.checkpoint.npz") as file:
        assert len(json.loads(str(file["run"]))["history"]["loss"]) == 1
    train_and_compare(tmp_path, whole)


# -------------------- a run is a process

TINY = {"profile": "quick", "epochs": 2, "train_images": 48, "val_images": 16, "batch_size": 32}


def tiny(model="resnet20", **changes):
    return rh.make_config(model, **{**TINY, **changes})


@pytest.fixture(scope="module")
def pair(small_world, tmp_path_factory):
    """Two configurations, and the outcomes of their runs in this process (one thread each)."""
    configs = [tiny(epochs=6), tiny("plain20", epochs=6)]
    folder = tmp_path_factory.mktemp("pair")
    return configs, [outcome(rh.train_run(one, folder)) for one in configs]


def test_runs_in_processes_side_by_side_equal_runs_in_this_one(pair, tmp_path, monkeypatch, capsys):
    (configs, alone), shown = pair, []
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(rh.joblib, "cpu_count", lambda: 2)
    context, started = multiprocessing.context.SpawnProcess, []
    start = context.start
    monkeypatch.setattr(context, "start", lambda self: started.append(1) or start(self))
    with rh.process_pool(2) as pool:
        table = rh.train_runs(
            configs, pool, tmp_path / "processes", keep_weights=True, show=shown.append
        )
    assert len(started) == 2  # none that has nothing to do: each takes seconds
    printed = capsys.readouterr().out
    for number, name in ((1, "ResNet-20"), (2, "plain-20")):
        for epoch in (1, 6):
            assert f"[{number}/2] {name}, seed 0, epoch {epoch}/6: loss" in printed
    assert len(table) == 12 and not list((tmp_path / "processes").glob(".*"))
    assert shown and len(shown[-1]) == 12
    for one, expected in zip(configs, alone):
        path = rh.run_path(one, tmp_path / "processes")
        assert path.with_suffix(".weights.h5").exists()
        assert rh.read_run(path)["environment"]["threads"] == 1
        assert outcome(rh.read_run(path)) == expected
    again = rh.train_runs(configs, folder=tmp_path / "processes")
    assert capsys.readouterr().out.count("loaded, not trained again") == 2
    assert again.equals(table)


@pytest.mark.parametrize("workers", (1, 2))
def test_a_failure_is_told_at_once_and_whole(tmp_path, workers):
    """The other run would take an hour."""
    bad, long = tiny(train_images=5000), tiny(epochs=5000)
    with pytest.raises(ValueError, match="train_images") as error:
        with rh.process_pool(workers) as pool:
            rh.train_runs([long, bad] if workers == 2 else [bad, long], pool, tmp_path)
    assert rh.run_path(bad).stem in error.value.__notes__[0]
    assert "in _train\n" in str(error.value.__cause__)  # the traceback of the other process
    with filelock.FileLock(rh.run_path(long, tmp_path).with_suffix(".lock"), timeout=10):
        pass  # nobody trains it
    assert not rh.run_path(long, tmp_path).exists()


def flip_weights(path):
    flip_bit(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "suffix, damage",
    [
        (".json", lambda path: path.write_text("{}")),
        (".checkpoint.npz", flip_weights),
        (".checkpoint.npz", lambda path: rewrite(path, run="{}")),
        (".checkpoint.npz", lambda path: rewrite(path, run="no json")),
    ],
)
def test_what_is_damaged_is_found_before_anything_trains(tmp_path, monkeypatch, suffix, damage):
    first, second = tiny(), tiny("plain20")
    path = rh.run_path(second, tmp_path)
    if suffix == ".json":
        rh.train_run(tiny("plain20"), tmp_path)
    else:
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            rh.train_run(second, tmp_path)
    damage(path.with_suffix(suffix))

    class Refusing:
        def submit(self, *_):
            raise AssertionError("something was trained")

    with pytest.raises(ValueError, match=f"{path.stem}{suffix} is damaged"):
        rh.train_runs([first, second], Refusing(), tmp_path)


def test_a_run_that_another_process_has_ended_meanwhile_has_all_its_epochs(tmp_path):
    first, second = tiny(epochs=1), tiny(epochs=1, seed=1)

    class Cluster:
        def submit(self, function, config, *rest):
            rh.train_run(second, tmp_path)  # the other process
            job = concurrent.futures.Future()
            job.set_result(function(config, *rest))
            return job

    table = rh.train_runs([first, second], Cluster(), tmp_path)
    assert sorted(table.seed) == [0, 1]


def test_a_folder_that_shows_files_late_is_no_error(tmp_path):
    """As network file systems do: what the executor hands back is the run."""
    one = tiny(epochs=1)
    run = rh.train_run(one, tmp_path / "elsewhere")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = type("Late", (), {"submit": lambda self, *_: pool.submit(lambda: run)})()
        table = rh.train_runs([one], late, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert table.loss.tolist() == run["history"]["loss"]


def test_a_job_that_has_ended_is_not_cancelled(tmp_path):
    """A cluster may refuse to cancel a job that it has forgotten."""

    cancelled = []

    class Job(concurrent.futures.Future):
        def cancel(self):
            cancelled.append(self)
            raise OSError("no such job")

    class Cluster:
        def submit(self, function, config, *rest):
            job = Job()
            if config["seed"] == 0:
                job.set_result(function(config, *rest))
            if config["seed"] == 1:
                job.set_exception(ZeroDivisionError("the run's own failure"))
            return job

    assert len(rh.train_runs([tiny(epochs=1)], Cluster(), tmp_path)) == 1 and not cancelled
    configs = [tiny(epochs=1, seed=seed) for seed in (0, 1, 2, 3)]
    with pytest.raises(ZeroDivisionError):
        rh.train_runs(configs, Cluster(), tmp_path)
    assert len(cancelled) == 2  # both that wait, although the first refuses


def test_an_executor_that_trains_nothing_is_an_error(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        monkey = type("Lazy", (), {"submit": lambda self, *_: pool.submit(int)})()
        with pytest.raises(RuntimeError, match="came back untrained"):
            rh.train_runs([tiny()], monkey, tmp_path)


def test_two_runs_never_share_a_name(tmp_path, monkeypatch):
    monkeypatch.setitem(rh.SIZES, "mnist", (96, 48))
    monkeypatch.setitem(rh.SIZES, "/somewhere/cats_vs_dogs", (96, 48))
    sizes = {"train_images": 96, "val_images": 48}
    configs = [
        rh.make_config("resnet20", profile, dataset, **sizes, **changes)
        for profile in ("full", "test")
        for dataset in ("cats_vs_dogs", "mnist")
        for changes in ({}, {"mirrored": 1}, {"mirrored": 0.5}, {"learning_rate": 0.003})
    ]
    assert len({rh.run_path(one, tmp_path) for one in configs}) == len(configs) == 16
    for rate in (np.float32(0.003), np.float64(0.003)):
        assert rh.make_config("resnet20", learning_rate=rate)["learning_rate"] == 0.003
    assert rh.run_path(tiny(learning_rate=1)) == rh.run_path(tiny(learning_rate=1.0))
    with pytest.raises(ValueError, match="each run once"):
        rh.train_runs([tiny(), tiny()], folder=tmp_path)
    with pytest.raises(ValueError, match="each run once"):
        rh.train_runs([])
    with pytest.raises(ValueError, match="each run once"):
        rh.train_runs(config for config in [tiny(), tiny()])


def test_weights_that_a_finished_run_has_not_kept_are_asked_for_in_vain(tmp_path):
    rh.train_run(tiny(epochs=1), tmp_path)
    for train in (
        rh.train_run,
        lambda one, *rest, **kept: rh.train_runs([one], None, *rest, **kept),
    ):
        with pytest.raises(ValueError, match="weights.h5 beside the finished run"):
            train(tiny(epochs=1), tmp_path, keep_weights=True)


def start_runs(folder, *configs, workers=1):
    """A process that calls train_runs, in a process group of its own."""
    lines = (
        # A process that was started in the background ignores Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import resnet_helpers as rh\n"
        f"with rh.process_pool({workers}) as pool:\n"
        f"    rh.train_runs({list(configs)}, pool, {str(folder)!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", lines],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def children(pid):
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids, limit=30):
    end = time.time() + limit
    while any(map(alive, pids)):
        assert time.time() < end, "a process lives on"
        time.sleep(0.1)


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("how", ("kill -9", "Ctrl-C"))
def test_no_process_and_no_litter_is_left_and_the_twin_is_kept_out(
    tmp_path, monkeypatch, capsys, how
):
    config = tiny(epochs=500)
    path, acquire = rh.run_path(config, tmp_path), filelock.FileLock.acquire
    with start_runs(tmp_path, config) as parent:
        assert "epoch 1/500" in next((line for line in parent.stdout if "epoch" in line), "")
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Another process"):
            patch.setattr(filelock.FileLock, "acquire", lambda lock: acquire(lock, timeout=0.2))
            rh.train_run(config, tmp_path)
        processes = children(parent.pid)
        assert processes
        if how == "Ctrl-C":
            os.killpg(parent.pid, signal.SIGINT)
            assert "KeyboardInterrupt" in parent.communicate(timeout=30)[0]
        else:
            parent.kill()
        all_end(processes)
    with filelock.FileLock(path.with_suffix(".lock"), timeout=1):
        epochs = len(rh._saved_run(path)["history"]["loss"])
        assert 0 < epochs < 500
    assert sorted(each.suffix for each in tmp_path.iterdir()) in ([".lock", ".npz"], [".npz"])
    stop_after(epochs + 1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        rh.train_run(config, tmp_path)
    assert f"Going on after epoch {epochs} of 500" in capsys.readouterr().out


def test_a_process_that_ends_finishes_what_it_is_writing(tmp_path):
    with rh.process_pool() as pool:
        pool.submit(write_slowly, tmp_path / "file")
        end = time.time() + 60
        while not (tmp_path / ".file").exists():
            assert time.time() < end
            time.sleep(0.05)
    assert (tmp_path / "file").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1


@needs_proc
def test_no_orphan_even_if_the_parent_dies_while_the_run_is_being_started(tmp_path):
    with start_runs(tmp_path, tiny(epochs=500)) as parent:
        processes, end = [], time.time() + 60
        while len(processes) < 2:  # the run's, and one that multiprocessing keeps
            assert time.time() < end and parent.poll() is None, "no process was started"
            processes = children(parent.pid)
        parent.kill()
        all_end(processes, 60)
    assert not list(tmp_path.glob("*.npz"))


@needs_proc
def test_a_run_that_is_killed_is_named(tmp_path):
    """As the system does when memory runs out."""
    config = tiny(epochs=500)
    with start_runs(tmp_path, config) as parent:
        next(line for line in parent.stdout if "epoch" in line)
        for child in children(parent.pid):
            command = pathlib.Path(f"/proc/{child}/cmdline").read_text()
            if "spawn_main" in command:
                os.kill(child, signal.SIGKILL)
        said = parent.communicate(timeout=60)[0]
    assert "BrokenProcessPool" in said and f"The run was {rh.run_path(config).stem}" in said


@needs_proc
def test_a_cluster_that_loses_a_worker_ends_in_the_same_histories(pair, tmp_path):
    """Dask with two worker processes; the run that its killed worker trained goes on elsewhere."""
    distributed = pytest.importorskip("dask.distributed")
    configs, expected = pair
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as workers,
        distributed.Client(workers) as client,
    ):
        processes, killed = client.run(os.getpid), []

        def kill_one(epochs):
            if not killed and len(epochs) > 3:
                killed.append(
                    next(worker for worker, tasks in client.processing().items() if tasks)
                )
                os.kill(processes[killed[0]], signal.SIGKILL)

        rh.train_runs(configs, client.get_executor(pure=False), tmp_path / "cluster", show=kill_one)
    runs = [rh.read_run(rh.run_path(one, tmp_path / "cluster")) for one in configs]
    assert killed and [outcome(run) for run in runs] == expected
    assert sum("earlier_environments" in run for run in runs) == 1


def test_importing_the_helper_starts_no_device_and_leaves_the_look_of_other_figures_alone():
    lines = (
        "import matplotlib; before = dict(matplotlib.rcParams); "
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import resnet_helpers; "
        "now = dict(matplotlib.rcParams); import tensorflow as tf; "
        "tf.config.threading.set_intra_op_parallelism_threads(1); "
        "tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0], "
        "[tf.config.LogicalDeviceConfiguration()] * 2); "
        "print(len(tf.config.list_logical_devices('CPU')), "
        "[key for key in now if now[key] != before[key]])"
    )
    ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert ended.stdout.strip() == "2 []", ended.stderr


# -------------------- input pipeline


def numbered(count, seed_and_epoch):
    """Batches in which label i belongs to image i."""
    return rh.Batches(rh.load_data().train_images[:count], np.arange(count), 16, seed_and_epoch)


def labels_of(batches):
    return np.concatenate([batches[i][1] for i in range(len(batches))])


def test_every_training_image_once_an_epoch_in_a_reproducible_order():
    orders = []
    for epoch in range(3):
        batches, twin, other = (numbered(50, (seed, epoch)) for seed in (0, 0, 1))
        orders.append(labels_of(batches))
        assert sorted(orders[-1]) == list(range(50))
        assert (orders[-1] == labels_of(twin)).all() and (orders[-1] != labels_of(other)).any()
        assert all(
            np.array_equal(batches[i][0], twin[i][0]) for i in (3, 0)
        )  # in any order of access
    assert all((a != b).any() for a, b in itertools.combinations(orders, 2))
    assert [len(batches[i][1]) for i in range(len(batches))] == [16, 16, 16, 2]


def test_every_validation_image_once_in_order():
    data = rh.load_data()
    batches = rh.Batches(data.val_images, data.val_labels, 20)
    images = np.concatenate([batches[i][0] for i in range(len(batches))])
    assert images.dtype == np.float32 and images.min() >= 0 and 0.5 < images.max() <= 1
    np.testing.assert_array_equal(np.round(images * 255), data.val_images)
    np.testing.assert_array_equal(labels_of(batches), data.val_labels)


def test_augmented_images_are_flips_and_shifts():
    images = rh.load_data().train_images[:24]
    changed = rh.augment(images, np.random.default_rng(3))
    assert changed.dtype == images.dtype and changed.shape == images.shape
    np.testing.assert_array_equal(changed, rh.augment(images, np.random.default_rng(3)))
    found = []
    for before, after in zip(images, changed):
        padded = np.pad(before, ((4, 4), (4, 4), (0, 0)))
        ways = [
            (flip, dy, dx)
            for flip, dy, dx in itertools.product((1, -1), range(9), range(9))
            if np.array_equal(padded[dy : dy + 32, dx : dx + 32][:, ::flip], after)
        ]
        assert len(ways) == 1
        found += ways
    assert len(set(found)) > 12 and {flip for flip, _, _ in found} == {1, -1}


def test_shifts_reach_four_pixels_each_way():
    """A white pixel in the middle goes to each place of 9x9 pixels, and nowhere else."""
    images = np.zeros((4000, 33, 33, 3), "uint8")
    images[:, 16, 16] = 255
    changed = rh.augment(images, np.random.default_rng(0))
    places = {tuple(place) for place in np.argwhere(changed[..., 0])[:, 1:].tolist()}
    assert places == set(itertools.product(range(12, 21), repeat=2))
    wide = rh.augment(np.zeros((2, 8, 12, 3), "uint8"), np.random.default_rng(0))
    assert wide.shape == (2, 8, 12, 3)


def test_sgd_has_the_papers_momentum():
    optimizer = rh.build_from_config(config(optimizer="sgd"), 2).optimizer
    assert isinstance(optimizer, keras.optimizers.SGD) and optimizer.momentum == 0.9


@pytest.mark.parametrize("epoch", (0, 2))
def test_fit_sees_each_epochs_own_order(epoch):
    """What the net receives, not what the pipeline hands out."""
    train, seen = numbered(50, (0, epoch)), []

    class Eye(keras.Model):
        def train_step(self, batch):
            seen.append([np.array(part) for part in batch])
            return {"loss": 0.0}

    eye = Eye()
    eye.compile(run_eagerly=True)
    eye.fit(train, shuffle=False, verbose=0)
    expected = numbered(50, (0, epoch))
    assert len(seen) == len(expected)
    for index in range(len(expected)):
        for part, wanted in zip(seen[index], expected[index]):
            np.testing.assert_array_equal(part, wanted)


def test_a_run_takes_its_order_from_its_seed_and_the_epoch(tmp_path, monkeypatch):
    keys = []

    class Recorded(rh.Batches):
        def __init__(self, images, labels, batch_size, key=None):
            keys.append(key)
            super().__init__(images, labels, batch_size, key)

    monkeypatch.setattr(rh, "Batches", Recorded)
    rh.train_run(config(seed=7), tmp_path)
    assert keys == [None, (7, 0), (7, 1)]


# -------------------- backends and devices


@pytest.mark.parametrize("backend", ("jax", "torch"))
def test_other_backends_agree_and_train_without_tensorflow(tmp_path, backend):
    """With the images in a .npz, and neither TensorFlow nor TFDS; the reference is this process."""
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    model = rh.create_model("resnet18", seed=3)
    weights = tmp_path / "weights.npz"
    np.savez(weights, **{str(i): value for i, value in enumerate(model.get_weights())})
    printed = finish(
        start(
            tmp_path / "results",
            {"epochs": 2, "train_images": 16, "val_images": 16, "batch_size": 16},  # 2 steps
            env={"KERAS_BACKEND": backend},
            weights=str(weights),
            without=["tensorflow", "tensorflow_datasets"],
        )
    )
    received = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    assert received == pytest.approx(losses(rh, weights), rel=1e-4)
    [path] = (tmp_path / "results").glob("*.json")
    run = rh.read_run(path)
    assert (
        run["environment"]["backend"] == backend
        and run["status"] == "finished"
        and run["val_predictions"]
    )
