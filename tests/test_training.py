import concurrent.futures
import errno
import importlib.util
import itertools
import json
import math
import os
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
from training_runs import ROOT, SMALL, add_small_nets, finish, losses, outcome, start, wait_for, write_images


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory):
    """Small nets, and made-up images in place of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in write_images(tmp_path_factory.mktemp("images") / "decoded").items():
            patch.setenv(name, value)
        add_small_nets(rh, patch.setitem)
        rh.load_data.cache_clear()
        yield
        rh.load_data.cache_clear()


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
    return folder / "resnet10-seed0.checkpoint.npz"


def train_and_compare(folder, whole, *left):
    """Train (or go on) in `folder` to the run that was never interrupted; nothing is left there but `left`."""
    run = rh.train_run(config(), folder)
    assert outcome(run) == outcome(whole[1])
    assert outcome(rh.read_run(rh.run_path(config(), folder))) == outcome(run)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["resnet10-seed0.json", *left])


def flip_bit(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


# ------------------------------------------------------------------------------ exact, also after a stop


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
    (tmp_path / ".1234abcd.resnet10-seed0.json").write_text("what a kill while saving leaves")
    train_and_compare(tmp_path, whole)
    assert ("Going on after epoch 1 of 2" in capsys.readouterr().out) == (epoch == 2)


def test_goes_on_exactly_after_the_stop_button(whole, tmp_path, monkeypatch, capsys):
    fetch = rh.Batches.__getitem__

    def stop(batches, index):
        if batches.key and (batches.key[1], index) == (1, 1):
            signal.raise_signal(signal.SIGINT)  # what Jupyter's stop button sends
        return fetch(batches, index)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
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
    assert rates[0] == 0 and rates[1] == pytest.approx(5e-4, rel=0.01) and rates[2] == pytest.approx(1e-3)
    assert rates[2] > rates[3] > rates[4] > rates[5] and rates[5:] == pytest.approx([0, 0], abs=1e-8)


def predictions(run):
    return np.frombuffer(rh.zlib.decompress(rh.base64.b64decode(run["val_predictions"])), "uint8")


def test_predictions_are_kept_for_every_validation_image(whole):
    labels = rh.load_data().val_labels[: SMALL["val_images"]]
    assert np.mean(predictions(whole[1]) == labels) == pytest.approx(whole[1]["history"]["val_accuracy"][-1])


def test_kept_weights_are_those_of_the_end_and_nothing_else(whole, tmp_path):
    run = rh.train_run(config(), tmp_path, keep_weights=True)
    assert outcome(run) == outcome(whole[1])
    weights = tmp_path / "resnet10-seed0.weights.h5"
    model = rh.create_model("resnet10")
    model.load_weights(weights)
    classes = model(rh.normalize(rh.load_data().val_images[: SMALL["val_images"]])).numpy().argmax(-1)
    np.testing.assert_array_equal(classes, predictions(run))
    assert weights.stat().st_size < 1.1 * 4 * model.count_params()  # the optimiser's state would double it at least


@pytest.mark.parametrize("rate", (1e-2, keras.optimizers.schedules.CosineDecay(1e-2, 10)))
def test_adam_equals_keras(rate):
    rng = np.random.default_rng(0)
    start, gradients = rng.uniform(1, 2, (3, 5)).astype("float32"), rng.normal(size=(8, 3, 5)).astype("float32")
    results = []
    for kind in (rh.Adam, keras.optimizers.Adam):
        variable, optimizer = keras.Variable(start), kind(rate)
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        results.append(np.array(variable))
        state = [np.array(v) for v in optimizer.variables]
        results.append(np.concatenate([value.ravel() for value in state[2:]]))  # without steps and learning rate
    assert np.abs(results[0] - start).min() > 1e-4
    np.testing.assert_allclose(results[0], results[2], rtol=1e-6)
    np.testing.assert_allclose(results[1], results[3], rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------- damaged, full, diverged


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


@pytest.mark.parametrize("damage, reason", (
    (truncate, "not a zip file"), (lambda path: flip_bit(path, 3_000_000), "CRC"),
    (drop_last, "is not a file in the archive"),
    (lambda path: path.write_bytes(b""), "No data left"), (lambda path: path.write_text("0" * 999), "")))
def test_a_checkpoint_that_cannot_be_read_is_named_and_changes_nothing(fresh, checkpoint, tmp_path, damage, reason):
    run, state = fresh
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    kept, before = path.read_bytes(), [np.array(variable) for variable in state]
    with pytest.raises(ValueError, match=f"checkpoint.npz is damaged .*{reason}.*Move it away"):
        rh._restore(path, run, state)
    assert path.read_bytes() == kept and all(np.array_equal(a, b) for a, b in zip(before, state))


@pytest.mark.parametrize("change, reason", (
    (make_foreign, "seed: 5, wanted 0"),
    (lambda path: change_environment(path, device="NVIDIA H100"), "device: 'NVIDIA H100', wanted 'CPU"),
    (lambda path: change_environment(path, images_crc32=1), "images_crc32: 1, wanted"),
    (lambda path: change_environment(path, labels_crc32=1), "labels_crc32: 1, wanted")))
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
    assert [was["threads"] for was in run["earlier_environments"]] == [77] and run["environment"]["threads"] != 77
    assert outcome(run) == outcome(whole[1])


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


def test_a_learning_rate_that_is_too_high_diverges(tmp_path):
    assert rh.train_run(config(learning_rate=1e30), tmp_path)["status"] == "diverged"


def test_a_finished_run_is_loaded_and_nothing_is_deleted(whole, tmp_path, monkeypatch):
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    (tmp_path / "resnet10-seed0.checkpoint.npz").write_text("of a training that somebody wants to go on with")
    (tmp_path / ".1234abcd.resnet10-seed0.json").write_text("of another process, which is just writing")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(rh, "load_data", lambda *_: fail("training"))
    assert outcome(rh.train_run(config(), tmp_path)) == outcome(whole[1])
    assert sorted(tmp_path.iterdir()) == before
    path.rename(rh.run_path(config(epochs=3), tmp_path))
    with pytest.raises(ValueError, match=r"resnet10-epochs_3-seed0\.json belongs to another run "
                                         r"\(epochs: 2, wanted 3\)"):
        rh.train_run(config(epochs=3), tmp_path)


@pytest.mark.parametrize("damage", (truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("[]")))
def test_a_damaged_results_file_is_named_and_kept(whole, tmp_path, damage):
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    damage(path)
    damaged = path.read_bytes()
    for read in (lambda: rh.train_run(config(), tmp_path), lambda: rh.read_runs(tmp_path)):
        with pytest.raises(ValueError, match=r"resnet10-seed0\.json is damaged"):
            read()
    assert path.read_bytes() == damaged


def test_an_unwritable_folder_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Cannot write .*file.*What was saved before is safe.*RESNET_RESULTS"):
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
    with np.load(tmp_path / "resnet10-seed0.checkpoint.npz") as file:
        assert len(json.loads(str(file["run"]))["history"]["loss"]) == 1
    train_and_compare(tmp_path, whole)


# ---------------------------------------------------------------------------------- a run is a process

TINY = {"profile": "quick", "epochs": 2, "train_images": 48, "val_images": 16, "batch_size": 32}


def tiny(model="resnet20", **changes):
    return rh.make_config(model, **{**TINY, **changes})


def test_runs_in_processes_side_by_side_equal_runs_in_this_one(tmp_path, monkeypatch, capsys):
    configs = [tiny(), tiny("plain20")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        table = rh.train_runs(configs, pool, folder=tmp_path / "processes", keep_weights=True)
    printed = capsys.readouterr().out
    for number, name in ((1, "ResNet-20"), (2, "plain-20")):
        for epoch in (1, 2):
            assert f"[{number}/2] {name}, seed 0, epoch {epoch}/2: loss" in printed
    assert len(table) == 4 and not list((tmp_path / "processes").glob(".*"))
    assert all(rh.run_path(one, tmp_path / "processes").with_suffix(".weights.h5").exists() for one in configs)
    for one in configs:
        assert outcome(rh.train_run(one, tmp_path / "here")) == outcome(rh.train_run(one, tmp_path / "processes"))
    again = rh.train_runs(configs, folder=tmp_path / "processes")
    assert capsys.readouterr().out.count("loaded, not trained again") == 2
    assert again.equals(table)


def test_a_run_is_a_command(tmp_path):
    """With a configuration alone; train_runs above adds options."""
    config = tiny(epochs=1)
    subprocess.run([sys.executable, str(ROOT / "resnet_helpers.py"), json.dumps(config)],
                   env=os.environ | {"RESNET_RESULTS": str(tmp_path)}, check=True)
    run = rh.read_run(tmp_path / "quick" / "cats_vs_dogs" / rh.run_path(config).name)
    assert run["config"] == config and len(run["history"]["loss"]) == 1


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="resnet20-.*-seed0 ended with status 1. ValueError: Needed: train_images"):
        rh.train_runs([tiny(train_images=5000)], folder=tmp_path)


def start_runs(folder, *configs):
    """A process that calls train_runs."""
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import resnet_helpers as rh; " \
            f"rh.train_runs({list(configs)}, folder={str(folder)!r})"
    return subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_ends_with_its_parent_and_its_twin_is_kept_out(tmp_path, monkeypatch):
    """Kill -9 the process that called train_runs: no orphan trains on, and the lock is free again."""
    config = tiny(epochs=500)
    path, acquire = rh.run_path(config, tmp_path), filelock.FileLock.acquire
    with start_runs(tmp_path, config) as parent:
        assert "epoch 1/500" in next((line for line in parent.stdout if "epoch" in line), "")
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Another process trains"):
            patch.setattr(filelock.FileLock, "acquire", lambda lock: acquire(lock, timeout=0.2))
            rh.train_run(config, tmp_path)
        parent.kill()
    with filelock.FileLock(path.with_suffix(".lock"), timeout=10):  # its process is gone
        epochs = len(rh._table_so_far(path, []))
        time.sleep(2)
        assert 0 < epochs == len(rh._table_so_far(path, [])) < 500


def test_no_orphan_even_if_the_parent_dies_while_the_run_is_being_started(tmp_path):
    config = tiny(epochs=500)
    with start_runs(tmp_path, config) as parent:
        while not list(tmp_path.glob(".*.lease")):
            time.sleep(0.1)
        time.sleep(1)
        parent.kill()
    time.sleep(15)  # time to import everything and to begin
    with filelock.FileLock(rh.run_path(config, tmp_path).with_suffix(".lock"), timeout=0.1):
        assert not list(tmp_path.glob("*.npz"))


def test_a_run_that_is_killed_is_not_blamed_on_what_it_said_before(tmp_path):
    class Killed(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *args, **options):
            ended = subprocess.CompletedProcess([], -9, "", "E0000 failed call to cuInit")
            return super().submit(lambda: ended)

    with Killed(1) as pool, pytest.raises(RuntimeError, match="ended with status -9. Was it killed, or out of memory"):
        rh.train_runs([tiny()], pool, folder=tmp_path)
    with pytest.raises(ValueError, match="at least 1 configuration"):
        rh.train_runs([])


def test_importing_the_helper_starts_no_device():
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import resnet_helpers; import tensorflow as tf; " \
            "tf.config.threading.set_intra_op_parallelism_threads(1); " \
            "tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0], " \
            "[tf.config.LogicalDeviceConfiguration()] * 2); print(len(tf.config.list_logical_devices('CPU')))"
    ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert ended.stdout.strip() == "2", ended.stderr


# ---------------------------------------------------------------------------------------- input pipeline


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
        assert all(np.array_equal(batches[i][0], twin[i][0]) for i in (3, 0))  # in any order of access
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
        ways = [(flip, dy, dx) for flip, dy, dx in itertools.product((1, -1), range(9), range(9))
                if np.array_equal(padded[dy : dy + 32, dx : dx + 32][:, ::flip], after)]
        assert len(ways) == 1
        found += ways
    assert len(set(found)) > 12 and {flip for flip, _, _ in found} == {1, -1}


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


# ------------------------------------------------------------------------------- backends and devices


@pytest.mark.parametrize("backend", ("jax", "torch"))
def test_other_backends_agree_and_train_without_tensorflow(tmp_path, backend):
    """With the images in a .npz, and neither TensorFlow nor TFDS; the reference is this process."""
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    model = rh.create_model("resnet18", seed=3)
    weights = tmp_path / "weights.npz"
    np.savez(weights, **{str(i): value for i, value in enumerate(model.get_weights())})
    printed = finish(start(tmp_path / "results", {"epochs": 1, "train_images": 16, "val_images": 16, "batch_size": 16},
                           env={"KERAS_BACKEND": backend}, weights=str(weights),
                           without=["tensorflow", "tensorflow_datasets"]))
    received = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    assert received == pytest.approx(losses(rh, weights), rel=1e-4)
    [path] = (tmp_path / "results").glob("*.json")
    run = rh.read_run(path)
    assert run["environment"]["backend"] == backend and run["status"] == "finished" and run["val_predictions"]
