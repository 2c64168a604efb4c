import contextlib
import errno
import gc
import importlib.util
import itertools
import json
import math
import os
import signal
import types

import keras
import numpy as np
import pytest
import resnet_helpers as rh
from training_runs import SMALL, add_small_nets, finish, losses, outcome, start, wait_for, write_images


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory):
    """Small nets, and made-up images in place of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_DATA", str(write_images(tmp_path_factory.mktemp("images") / "images.npz")))
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


@pytest.fixture(scope="module")
def checkpoint(whole, tmp_path_factory):
    """The same run's checkpoint after its first epoch."""
    def stop(run):
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(KeyboardInterrupt):
        rh.train_run(config(), folder, on_epoch=stop)
    [path] = folder.iterdir()
    return path


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
    (tmp_path / "again").mkdir()
    train_and_compare(tmp_path / "again", whole)
    finish(fresh)
    assert outcome(rh.train_run(config(), tmp_path / "fresh")) == outcome(whole[1])
    assert len(whole[1]["history"]["loss"]) == 2 and whole[1]["val_predictions"]


@pytest.mark.parametrize("epoch", (1, 2))
def test_goes_on_exactly_after_kill_9(whole, tmp_path, capsys, epoch):
    with start(tmp_path) as process:
        wait_for(process, f"epoch {epoch}/2")
        process.kill()
    assert not list(tmp_path.glob("*.json"))
    (tmp_path / ".resnet10-seed0.json.1").write_text("what a kill while saving leaves")
    train_and_compare(tmp_path, whole)
    assert "going on after epoch" in capsys.readouterr().out or epoch == 1  # it may die before the first checkpoint


def test_goes_on_exactly_after_the_stop_button(whole, tmp_path, monkeypatch, capsys):
    def stop(recorder, batch, logs=None):
        if (recorder.train.epoch, batch) == (1, 1):
            signal.raise_signal(signal.SIGINT)  # what Jupyter's stop button sends

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rh._Recorder, "on_train_batch_end", stop)
            rh.train_run(config(), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    train_and_compare(tmp_path, whole)
    assert "going on after epoch 1 of 2" in capsys.readouterr().out


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


def test_predictions_are_kept_for_every_validation_image(whole):
    answers = rh.read_predictions(rh.run_path(config(), whole[0]))
    labels = rh.load_data().val_labels[: SMALL["val_images"]]
    assert np.mean(answers == labels) == pytest.approx(whole[1]["history"]["val_accuracy"][-1])


def test_a_trained_net_is_freed(whole, tmp_path):
    """Its graph would keep all its weights: some 300 MB a net in a notebook that trains 18 of them."""
    def graphs():
        gc.collect()
        return sum(type(thing).__name__ == "FuncGraph" for thing in gc.get_objects())

    before = graphs()
    rh.train_run(config(), tmp_path)
    assert graphs() == before


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


def test_after_a_damaged_checkpoint_the_run_starts_afresh(whole, checkpoint, tmp_path, capsys):
    copy = tmp_path / checkpoint.name
    copy.write_bytes(checkpoint.read_bytes())
    flip_bit(copy, 3_000_000)
    damaged = copy.read_bytes()
    train_and_compare(tmp_path, whole, "resnet10-seed0.damaged")
    assert (tmp_path / "resnet10-seed0.damaged").read_bytes() == damaged
    printed = capsys.readouterr().out
    assert "checkpoint cannot be used" in printed and "resnet10-seed0.damaged" in printed


@pytest.fixture(scope="module")
def recorder(small_world):
    """Of a net that is about to train."""
    model = rh.build_from_config(config(), 2)
    model.optimizer.build(model.trainable_variables)
    run = {"config": config(), "status": "finished", "history": {key: [] for key in rh.HISTORY},
           "environment": rh.environment(rh.load_data())}
    recorder = rh._Recorder(run, rh.pathlib.Path("none"), None, None)
    recorder.set_model(model)
    return recorder


def other_images(path):
    with np.load(path) as file:
        run = json.loads(str(file["run"]))
    run["environment"]["images_crc32"] += 1
    rewrite(path, run=json.dumps(run))


@pytest.mark.parametrize("damage, reason", ((truncate, "not a zip file"), (make_foreign, "another configuration"),
                                            (other_images, "another images_crc32"), (drop_last, "another net"),
                                            (lambda path: rewrite(path, **{"0": np.ones(3)}), "another net")))
def test_a_checkpoint_that_cannot_be_used_changes_nothing(recorder, checkpoint, tmp_path, capsys, damage, reason):
    """All of it or nothing: the net that starts afresh must not keep half of another one's weights."""
    recorder.checkpoint = tmp_path / checkpoint.name
    recorder.checkpoint.write_bytes(checkpoint.read_bytes())
    damage(recorder.checkpoint)
    before = recorder.model.get_weights()
    assert recorder.restore() == 0
    assert all(np.array_equal(a, b) for a, b in zip(before, recorder.model.get_weights()))
    assert not recorder.history["loss"] and reason in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".damaged"]


def fail(reason):
    raise ValueError(f"no {reason} allowed")


def test_divergence_is_recorded(whole, tmp_path, monkeypatch, capsys):
    def stop(run):
        raise KeyboardInterrupt

    residual = rh.run_path(config(), tmp_path)
    residual.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    plain = config(model="plain10", epochs=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rh, "normalize", lambda images: np.full(images.shape, np.nan, "float32"))
        rh.train_run(plain, tmp_path, on_epoch=stop)
    again = rh.train_run(plain, tmp_path)  # does not go on: it has diverged
    assert "DIVERGED in epoch 1" in capsys.readouterr().out
    path = rh.run_path(plain, tmp_path)
    for run in (again, rh.read_run(path), rh.train_run(plain, tmp_path)):
        assert run["status"] == "diverged" and len(run["history"]["loss"]) == 1
    assert json.loads(path.read_text(), parse_constant=fail)["history"]["loss"] == [None]
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, residual.name]
    table = rh.percent_table(rh.ablation_table(rh.read_runs(tmp_path)))
    assert table.plain.item() == table.difference.item() == "diverged"
    assert table.residual.item() == f"{100 * whole[1]['history']['val_accuracy'][-1]:.1f}"


def test_a_learning_rate_that_is_too_high_diverges(tmp_path, capsys):
    assert rh.train_run(config(learning_rate=1e30), tmp_path)["status"] == "diverged"
    assert "DIVERGED in epoch" in capsys.readouterr().out


def test_a_finished_run_is_loaded(whole, tmp_path, monkeypatch, capsys):
    folder, run = whole
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), folder).read_bytes())
    path.with_suffix(".ckpt").write_text("left by a kill in the run's last moment")
    with monkeypatch.context() as patch:
        patch.setattr(rh, "load_data", lambda *_: fail("training"))
        assert outcome(rh.train_run(config(), tmp_path)) == outcome(run)
        assert "not trained again" in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == [path]
        with pytest.raises(ValueError, match=r"resnet10-seed0\.json holds another run \(epochs: 2, wanted 3\)"):
            rh.train_run(config(epochs=3), tmp_path)
    epochs = []
    again = rh.train_run(config(epochs=1), tmp_path, retrain=True, on_epoch=epochs.append)
    assert len(epochs) == len(again["history"]["loss"]) == 1
    assert rh.read_run(path)["config"]["epochs"] == 1


@pytest.mark.parametrize("damage", (truncate, lambda path: flip_bit(path, 300), lambda path: path.write_bytes(b"")))
def test_a_damaged_results_file_is_named_and_kept(whole, tmp_path, damage):
    path = rh.run_path(config(), tmp_path)
    path.write_bytes(rh.run_path(config(), whole[0]).read_bytes())
    damage(path)
    damaged = path.read_bytes()
    for read in (lambda: rh.train_run(config(), tmp_path), lambda: rh.read_runs(tmp_path)):
        with pytest.raises(ValueError, match=r"resnet10-seed0\.json is damaged"):
            read()
    assert path.read_bytes() == damaged


def test_an_unwritable_folder_fails_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rh, "load_data", lambda *_: fail("training"))
    with pytest.raises(OSError, match=r"Cannot write .*file.*nothing saved before is lost"):
        rh.train_run(config(), tmp_path / "file" / "results")


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    saved = []
    path = rh.run_path(config(), tmp_path)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(run):
        saved.append(path.with_suffix(".ckpt").read_bytes())
        monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match=r"Cannot write .*\.ckpt \(No space left on device\); nothing saved"):
        rh.train_run(config(), tmp_path, on_epoch=fill)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["resnet10-seed0.ckpt"]
    assert [path.with_suffix(".ckpt").read_bytes()] == saved
    train_and_compare(tmp_path, whole)


# ---------------------------------------------------------------------------------------- input pipeline


def numbered(count, **options):
    """Batches in which label i belongs to image i."""
    return rh.Batches(rh.load_data().train_images[:count], np.arange(count), 16, **options)


def labels_of(batches):
    return np.concatenate([batches[i][1] for i in range(len(batches))])


def test_every_training_image_once_an_epoch_in_a_reproducible_order():
    batches, twin, other = numbered(50, training=True), numbered(50, training=True), numbered(50, training=True, seed=1)
    orders = []
    for epoch in range(3):
        for each in (batches, twin, other):
            each.set_epoch(epoch)
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


@pytest.mark.parametrize("first", (0, 2))
def test_fit_sees_each_epochs_own_order(first):
    """From the start and going on at epoch 2; what the net receives, not what the pipeline hands out."""
    train, seen = numbered(50, training=True), []

    class Eye(keras.Model):
        def train_step(self, batch):
            seen.append([np.array(part) for part in batch])
            return {"loss": 0.0}

    eye, recorder = Eye(), rh._Recorder({"history": {}}, rh.pathlib.Path("none"), train, None)
    recorder.on_epoch_end = lambda *_: None
    eye.compile(run_eagerly=True)
    eye.fit(train, initial_epoch=first, epochs=4, shuffle=False, verbose=0, callbacks=[recorder])
    assert len(seen) == (4 - first) * len(train)
    expected = numbered(50, training=True)
    for epoch in range(first, 4):
        expected.set_epoch(epoch)
        for index in range(len(expected)):
            for part, wanted in zip(seen.pop(0), expected[index]):
                np.testing.assert_array_equal(part, wanted)


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
    [path] = (tmp_path / "results").iterdir()
    run = rh.read_run(path)
    assert run["environment"]["backend"] == backend and run["status"] == "finished" and run["val_predictions"]


def test_two_devices_equal_one_and_go_on_after_kill_9(whole, tmp_path):
    pytest.importorskip("tensorflow")
    with start(tmp_path, devices=2) as process:
        wait_for(process, "epoch 2/2")
        process.kill()
    assert "going on after epoch" in finish(start(tmp_path, devices=2))
    [path] = tmp_path.iterdir()
    history = rh.read_run(path)["history"]
    for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert history[key] == pytest.approx(whole[1]["history"][key], rel=1e-3)


@pytest.mark.parametrize("gpus, used, changes", (
    (1, None, {}), (2, 2, {}), (4, 4, {"val_images": 4}), (3, 2, {}),  # 3 do not divide a batch of 64
    (4, 2, {"val_images": 3}), (8, 4, {"train_images": 64 + 27}), (2, None, {"train_images": 65}),
))
def test_no_gpu_is_left_without_images(monkeypatch, gpus, used, changes):
    """A part without images would end the run: the smaller last batches too must reach all GPUs in use."""
    tf = pytest.importorskip("tensorflow")
    device = types.SimpleNamespace(name="GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [device] * gpus)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy",
                        lambda names: types.SimpleNamespace(scope=lambda: contextlib.nullcontext(len(names))))
    with rh._training_scope(config(**{"batch_size": 64, "train_images": 96, "val_images": 48, **changes})) as count:
        assert count == used
