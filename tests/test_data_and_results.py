"""The data (a tiny cats_vs_dogs in TFDS's own format); what is saved, read, compared, refused."""

import json
import os
import pathlib
import shutil
import sys
import types
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import resnet_helpers as rh
import scipy.stats
from notebook_code import format_percent


def test_split_sizes_values_and_one_decoding(tiny_cats, capsys):
    data = rh.load_data()
    assert (len(data.train_labels), len(data.val_labels)) == (140, 60)
    assert list(data.class_names) == ["cat", "dog"] and data.train_images.dtype == np.uint8
    assert data.train_images.shape == (140, 32, 32, 3)
    # A cat of the tiny data set is red, a dog blue: the images still belong to their labels.
    for images, labels in ((data.train_images, data.train_labels),
                           (data.val_images, data.val_labels)):
        assert ((images[..., 2].mean((1, 2)) > images[..., 0].mean((1, 2))) == labels).all()
    assert "Decoding" in capsys.readouterr().out
    again = rh.load_data()
    assert "Decoding" not in capsys.readouterr().out
    assert (again.train_images == data.train_images).all()
    assert (again.class_names == data.class_names).all()


def test_resizing_is_that_of_the_notebook(tiny_cats):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    raw = next(iter(tfds.load("cats_vs_dogs", split="train[70%:]", data_dir=rh.data_dir())))
    small = tf.image.resize(raw["image"], [32, 32], antialias=True).numpy() / 255
    assert abs(small - rh.normalize(rh.load_data().val_images[0])).max() <= 0.5001 / 255


def test_normalize():
    images = np.array([0, 51, 255], "uint8")
    assert rh.normalize(images).dtype == np.float32
    np.testing.assert_allclose(rh.normalize(images), [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2],
                                    lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]])
def test_a_damaged_file_of_images_is_named(tiny_cats, damage):
    expected = rh.load_data().train_images
    (path,) = (tiny_cats / "cache").glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="npz is damaged .*Move it away"):
        rh.load_data()
    path.unlink()
    assert (rh.load_data().train_images == expected).all()


@pytest.mark.parametrize("error", [PermissionError, MemoryError])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(tiny_cats, monkeypatch, error):
    rh.load_data()

    def refuse(*_):
        raise error("not now")

    monkeypatch.setattr(rh.np, "load", refuse)
    with pytest.raises(error, match="not now"):
        rh.load_data()


def test_a_file_that_is_being_read_is_replaced_afterwards(tmp_path, monkeypatch):
    """As on Windows, which refuses it meanwhile."""
    replace, refused = os.replace, []

    def busy(partial, path):
        if len(refused) < 2:
            refused.append(path)
            raise PermissionError(13, "being read")
        replace(partial, path)

    monkeypatch.setattr(os, "replace", busy)
    rh.write_atomically(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert (tmp_path / "file").read_text() == "new" and len(refused) == 2
    monkeypatch.setattr(os, "replace", lambda *_: refused.append(1) or os.stat("/nowhere"))
    with pytest.raises(OSError, match="Cannot write .*file"):
        rh.write_atomically(tmp_path / "file", lambda partial: partial.write_text("newer"))
    assert (tmp_path / "file").read_text() == "new"


def test_images_that_cannot_be_kept_are_an_error(tiny_cats, monkeypatch):
    (tiny_cats / "file").write_text("")
    monkeypatch.setenv("RESNET_DATA", str(tiny_cats / "file"))  # no folder: nothing can go into it
    with pytest.raises(OSError, match=str(tiny_cats / "file")):
        rh.load_data()


def test_decoded_images_need_no_prepared_data_set(tiny_cats, monkeypatch):
    expected = rh.load_data().train_images
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_cats / "none"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow_datasets", None)  # an import of it fails
        assert rh.prepare_dataset("full") == "cats_vs_dogs"
    assert (rh.load_data().train_images == expected).all()
    with pytest.raises(FileNotFoundError, match=r"\(name='cats_vs_dogs', image_size=64\)"):
        rh.load_data(image_size=64)
    asked = []
    monkeypatch.setattr(rh, "_download", asked.append)
    rh.prepare_dataset("full", image_size=64)
    assert asked == ["cats_vs_dogs"]
    (path,) = (tiny_cats / "cache").glob("*.npz")
    old = path.with_name("cats_vs_dogs-32px-00000000.npz")  # of another version: the newest counts
    np.savez(old, nothing=0)
    os.utime(old, (1, 1))
    assert (rh.load_data().train_images == expected).all()
    old.unlink()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="npz is damaged"):  # nothing to decode it from
        rh.load_data()


def test_no_images_is_an_error():
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"a label per image. Received: 0 for {count}"):
            rh.Batches(np.zeros((count, 32, 32, 3)), np.zeros(0))


def test_another_version_is_decoded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    names = []
    for version in ("4.0.9", "4.0.10"):
        (tmp_path / "cats_vs_dogs" / version).mkdir(parents=True)
        (tmp_path / "cats_vs_dogs" / version / "dataset_info.json").write_text(version)
        names.append(rh._decoded_path("cats_vs_dogs", 32).name)
    assert names[0] != names[1] == rh._decoded_path("cats_vs_dogs", 32).name


def test_an_empty_setting_means_the_default_and_home_is_expanded(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert rh.data_dir() == rh.pathlib.Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/elsewhere")
    assert rh.data_dir() == rh.pathlib.Path.home() / "elsewhere"


def test_a_failure_that_is_not_the_networks_stops_quick_too(tmp_path, monkeypatch):
    """No digits in place of cats because the disk was full."""
    import requests
    import tensorflow_datasets as tfds

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    answer = requests.Response()
    answer.status_code = 200
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: answer)
    monkeypatch.setattr(tfds, "builder", full)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RESNET_DATA", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="failed .*No space left on device"):
        rh.prepare_dataset("quick")


def test_a_data_set_of_several_kinds_is_told_with_all_of_them(tmp_path, monkeypatch):
    import requests
    import tensorflow_datasets as tfds

    kinds = [f"kind_{i}" for i in range(30)]
    answer = requests.Response()
    answer.status_code = 200
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: answer)
    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: types.SimpleNamespace(
        builder_config=kinds[0], builder_configs=dict.fromkeys(kinds)))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RESNET_DATA", str(tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        rh.prepare_dataset("quick", "cifar10_corrupted")
    assert all(f"cifar10_corrupted/{kind}" in str(error.value) for kind in kinds)


@pytest.mark.parametrize("status", [None, 403, 404])
def test_without_network_full_stops_and_quick_uses_digits(tmp_path, monkeypatch, capsys, status):
    import requests

    def no_network(*args, **kwargs):
        if status is None:
            raise requests.exceptions.ConnectionError("no route")
        response = requests.Response()
        response.status_code = status
        return response

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RESNET_DATA", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="cats_vs_dogs in .*TFDS_DATA_DIR.*RESNET_PROFILE=quick"):
        rh.prepare_dataset("full")
    assert rh.prepare_dataset("quick") == rh.DIGITS == rh.prepare_dataset("quick")
    assert capsys.readouterr().out.count("NO CATS, NO DOGS") == 2
    data = rh.load_data(rh.DIGITS)
    assert len(data.train_labels) + len(data.val_labels) == 1797 and len(data.class_names) == 10
    config = rh.make_config("resnet34", "quick", rh.DIGITS)
    assert (config["train_images"], config["val_images"]) == (len(data.train_labels), 512)
    assert "sklearn_digits" in str(rh.run_path(config)) and "cats" not in str(rh.run_path(config))


@pytest.mark.parametrize("call, words", [
    (lambda: rh.get_profile("fast"), "profile out of full, quick, test. Received: 'fast'"),
    (lambda: rh.make_config("resnet35"), "model out of plain18, resnet18.* Received: 'resnet35'"),
    (lambda: rh.make_config("resnet34", epoch=3),
     "entry of a configuration out of model, dataset, image_size.* Received: 'epoch'"),
    (lambda: rh.make_config("resnet34", schedule="constant"),
     "schedule out of half an epoch up, cosine down. Received: 'constant'"),
    (lambda: rh.make_config("resnet34", shortcut="none"),
     "shortcut out of zero_pad, projection, projection_all. Received: 'none'"),
    (lambda: rh.make_config("plain34", shortcut="projection"),
     "shortcut out of none. Received: 'projection'"),
    (lambda: rh.make_config("resnet18", optimizer="lion"),
     "optimizer out of adam, sgd. Received: 'lion'"),
    (lambda: rh.make_config("plain18", zero_gamma=True), "zero_gamma out of False. Received: True"),
    (lambda: rh.make_config("plain18", shortcut_scale=0.5),
     "shortcut_scale out of 1.0. Received: 0.5"),
    (lambda: rh.make_config("resnet18", stem="foo"),
     "stem out of imagenet, cifar. Received: 'foo'"),
    (lambda: rh.make_config("resnet18", batch_size=0), "batch_size, int from 1 .* Received: 0"),
    (lambda: rh.make_config("resnet18", epochs=0), "epochs, int from 1 .* Received: 0"),
    (lambda: rh.make_config("resnet18", seed=None), "seed, int from 0 .* Received: None"),
    (lambda: rh.make_config("resnet18", seed=-1), "seed, int from 0 .* Received: -1"),
    (lambda: rh.make_config("resnet18", seed=2**32),
     "seed, int from 0 to 4294967295. Received: 4294967296"),
    (lambda: rh.make_config("resnet18", train_images=16_284),
     "train_images up to 16283. Received: 16284"),
    (lambda: rh.make_config("resnet18", train_images=10.5),
     "train_images, int from 1 .* Received: 10.5"),
    (lambda: rh.make_config("resnet18", learning_rate="0.001"),
     "learning_rate, float from 1e-09 .* Received: '0.001'"),
    (lambda: rh.make_config("resnet18", learning_rate=0), "learning_rate, float from 1e-09"),
    (lambda: rh.make_config("resnet18", learning_rate=float("nan")),
     "learning_rate, float from 1e-09 .* Received: nan"),
    (lambda: rh.make_config("resnet18", mirrored=1.5),
     "mirrored, float from 0 to 1. Received: 1.5"),
])
def test_errors_name_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_profiles_are_what_the_pages_say():
    assert rh.PROFILES["full"] == {"train_images": 16_283, "val_images": 6_979, "epochs": 15}
    root = pathlib.Path(rh.__file__).parent
    readme, settings = (root / "README.md").read_text(), (root / "docs/settings.md").read_text()
    full, quick, test = (rh.PROFILES[name] for name in ("full", "quick", "test"))
    assert f"`full` (all images, {full['epochs']} epochs)" in settings
    assert f"the last of {full['epochs']} epochs" in readme
    for name, profile in (("quick", quick), ("test", test)):
        images, epochs = profile["train_images"], profile["epochs"]
        assert f"`{name}` ({images:,} images, {epochs} epochs)" in settings
    assert f"in batches of {quick['batch_size']}" in settings
    assert f"({quick['train_images']:,} training images, {quick['epochs']} epochs" in readme


ACCURACY = {"plain34": [0.60, 0.64], "resnet34": [0.70, 0.72], "plain50": [0.50, 0.54],
            "resnet50": [0.68, 0.66]}


def made_run(model, seed=0, last=None, status="finished", **changes):
    config = rh.make_config(model, "test", seed=seed, **changes)
    last = ACCURACY[model][seed] if last is None else last
    history = {key: [0.5] * (config["epochs"] - 1) + [last] for key in rh.HISTORY}
    history["val_accuracy"][0] = 0.9  # the best epoch is not the last one
    environment = {"backend": "tensorflow", "device": "CPU x86_64", "images_crc32": 1}
    return {"config": config, "status": status, "history": history, "environment": environment}


def save(folder, *runs):
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        rh.run_path(run["config"], folder).write_text(json.dumps(run))
    return rh.read_runs(folder)


def test_save_load_table_round_trip(tmp_path):
    runs = save(tmp_path, *(made_run(model, seed) for model in ACCURACY for seed in (0, 1)))
    assert len(runs) == 16 and set(runs.epoch) == {1, 2} and set(runs.classes) == {2}
    table = rh.ablation_table(runs)
    assert list(table.index) == ["34 layers", "50 layers"]
    assert set(table["plain seeds"]) == set(table["residual seeds"]) == {2}
    assert set(table["plain rate"]) == set(table["residual rate"]) == {0.001}
    np.testing.assert_allclose(table.plain, [0.62, 0.52])
    np.testing.assert_allclose(table.residual, [0.71, 0.67])
    np.testing.assert_allclose(table.difference, [0.09, 0.15])
    np.testing.assert_allclose(table["plain sd"], 0.04 / 2**0.5)  # half the range, times sqrt(2)
    np.testing.assert_allclose(table["residual sd"], 0.02 / 2**0.5)
    # The standard errors of the means are 0.02 and 0.01. Welch's degrees of freedom:
    freedom = (0.02**2 + 0.01**2) ** 2 / (0.02**4 + 0.01**4)
    half = scipy.stats.t.ppf(0.975, freedom) * (0.02**2 + 0.01**2) ** 0.5
    np.testing.assert_allclose(table.low, table.difference - half)
    np.testing.assert_allclose(table.high, table.difference + half)
    shown = format_percent(table)
    assert shown.loc["34 layers", "residual"] == "71.0 ± 1.4"
    ends = f"{9 - 100 * half:+.1f}, {9 + 100 * half:+.1f}"
    assert shown.loc["34 layers", "difference"] == f"+9.0 [{ends}]"
    back = pd.read_csv(pd.io.common.StringIO(table.to_csv()), index_col=0)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    words = shown.to_markdown().splitlines()[2].split()
    assert words[:8] == "| 34 layers | 62.0 ± 2.8 |".split()


def test_the_interval_is_welchs_and_needs_no_equal_numbers_of_seeds(tmp_path):
    plain, residual = [0.60, 0.64, 0.71, 0.52], [0.70, 0.72, 0.69]
    table = rh.ablation_table(save(
        tmp_path, *(made_run("plain34", seed, last) for seed, last in enumerate(plain)),
        *(made_run("resnet34", 5 + seed, last) for seed, last in enumerate(residual))))
    assert (table["plain seeds"].item(), table["residual seeds"].item()) == (4, 3)
    errors = [np.var(values, ddof=1) / len(values) for values in (plain, residual)]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 2)
    half = scipy.stats.t.ppf(0.975, freedom) * sum(errors) ** 0.5
    middle = np.mean(residual) - np.mean(plain)
    np.testing.assert_allclose(table[["low", "high"]].iloc[0], [middle - half, middle + half])


def test_a_shortcut_without_parameters_has_its_own_row(tmp_path):
    zero_pad = made_run("resnet34", last=0.8, shortcut="zero_pad")
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"), zero_pad)
    table = rh.ablation_table(runs)
    assert list(table.index) == ["34 layers", "34 layers, shortcut zero_pad"]
    np.testing.assert_allclose(table.difference, [0.1, 0.2])


def test_the_order_of_rows_changes_nothing_and_an_unfinished_run_is_refused(tmp_path):
    runs = save(tmp_path, *(made_run(model, seed) for model in ACCURACY for seed in (0, 1)))
    mixed = runs.iloc[::-1]
    pd.testing.assert_frame_equal(rh.ablation_table(mixed), rh.ablation_table(runs))
    cut = runs[(runs.epoch == 1) | (runs.model != "resnet34")]
    with pytest.raises(ValueError, match="all their epochs.*resnet34-test-seed0.json"):
        rh.ablation_table(cut)


def test_diverged_runs_have_no_number(tmp_path):
    diverged = made_run("plain34", status="diverged")
    diverged["history"]["loss"][1] = None
    table = rh.ablation_table(save(tmp_path, diverged, made_run("resnet34")))
    assert list(format_percent(table).loc["34 layers"]) == ["diverged", "70.0", "diverged"]


def test_one_diverged_seed_of_several_leaves_no_mean_and_no_interval(tmp_path):
    runs = [made_run(model, seed) for model in ("plain34", "resnet34") for seed in (0, 1)]
    runs[0]["status"], runs[0]["history"]["loss"][1] = "diverged", None
    row = rh.ablation_table(save(tmp_path, *runs)).loc["34 layers"]
    assert row[["plain", "plain sd", "difference", "low", "high"]].isna().all()
    assert row.residual == pytest.approx(0.71) and row["plain seeds"] == 2


def test_runs_that_hardly_learned_are_counted(tmp_path):
    """Their training loss in the last epoch is above 98% of guessing's."""
    runs = [made_run(model, seed) for model in ("plain34", "resnet34") for seed in (0, 1, 2)
            if seed < len(ACCURACY[model])]
    for run, loss in zip(runs, (0.67, 0.69, 0.68, 0.60)):
        run["history"]["loss"][1] = loss
    table = rh.ablation_table(save(tmp_path / "2", *runs))  # the limit is 0.679
    assert table["plain hardly learned"].item() == table["residual hardly learned"].item() == 1
    for run, loss in zip(runs, (2.25, 2.26, 2.27, 2.0)):  # the limit is 2.257
        run["history"]["loss"][1], run["environment"]["classes"] = loss, 10
    table = rh.ablation_table(save(tmp_path / "10", *runs))
    assert table["plain hardly learned"].item() == table["residual hardly learned"].item() == 1
    for run, loss in zip(runs, (0.31, 0.33, 0.32, 0.30)):  # the limit is 0.319
        run["history"]["loss"][1] = loss
        run["environment"] |= {"classes": 2, "guessing_loss": 0.325}  # 90% and 10%
    table = rh.ablation_table(save(tmp_path / "unequal", *runs))
    assert table["plain hardly learned"].item() == table["residual hardly learned"].item() == 1


@pytest.mark.parametrize("change, file", [
    ({"epochs": 3}, "resnet34-test-epochs_3-seed0.json"),
    ({"train_images": 95}, "resnet34-test-train_images_95-seed0.json"),
    ({"optimizer": "sgd"}, "resnet34-test-optimizer_sgd-seed0.json"),
    ({"batch_size": 32}, "resnet34-test-batch_size_32-seed0.json")])
def test_unequal_runs_are_refused_by_name(tmp_path, change, file):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34", **change))
    with pytest.raises(ValueError, match=rf"differ in {next(iter(change))} ") as error:
        rh.ablation_table(runs)
    assert "plain34-test-seed0.json" in str(error.value) and file in str(error.value)


@pytest.mark.parametrize("change", [{"stem": "cifar"}, {"stride_in": "3x3"}, {"mirrored": 1.0}])
def test_networks_with_different_starts_are_no_twins(tmp_path, change):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34", **change))
    with pytest.raises(ValueError, match="equal in layers, stem, stride_in, mirrored") as error:
        rh.ablation_table(runs)
    assert runs.file.iloc[-1] in str(error.value)


def test_unequal_machines_and_a_missing_twin_are_refused(tmp_path):
    for key in ("device", "images_crc32", "labels_crc32"):
        plain, other = made_run("plain34"), made_run("resnet34")
        plain["environment"]["labels_crc32"] = 7
        other["environment"] |= {"labels_crc32": 7, key: "another"}
        files = "plain34-test-seed0.json.*resnet34-test-seed0.json"
        with pytest.raises(ValueError, match=f"differ in {key} .*{files}"):
            rh.ablation_table(save(tmp_path / key, plain, other))
    with pytest.raises(ValueError, match="a plain and a residual .*resnet34-test-seed0.json"):
        rh.ablation_table(save(tmp_path / "alone", made_run("resnet34")))
    with pytest.raises(ValueError, match="a plain and a residual "):
        rh.ablation_table(save(tmp_path / "none", made_run("plain34"))[:0])
    with pytest.raises(ValueError, match="plain50-test-seed0.json"):
        rh.ablation_table(save(tmp_path / "plain", made_run("plain34"), made_run("resnet34"),
                               made_run("plain50")))


def test_equal_names_from_two_folders_are_refused(tmp_path):
    pair = made_run("plain34"), made_run("resnet34")
    one = save(tmp_path / "one", *pair)
    other = save(tmp_path / "other", pair[0], made_run("resnet50"))
    name = rh.run_path(pair[0]["config"]).name
    with pytest.raises(ValueError, match=name) as error:
        rh.ablation_table(pd.concat([one, other]))
    assert "resnet" not in str(error.value)


def test_a_copied_file_is_refused(tmp_path):
    plain = made_run("plain34")
    save(tmp_path, plain, made_run("resnet34"))
    path = rh.run_path(plain["config"], tmp_path)
    shutil.copy(path, tmp_path / "plain34-copy.json")
    with pytest.raises(ValueError, match=f"plain34-copy.json.*{path.name}"):
        rh.ablation_table(rh.read_runs(tmp_path))


def test_a_run_without_a_checksum_of_the_labels_is_comparable(tmp_path):
    old, new = made_run("plain34"), made_run("resnet34")
    new["environment"]["labels_crc32"] = 7
    assert rh.ablation_table(save(tmp_path, old, new)).difference.item() == pytest.approx(0.1)


def test_each_network_has_its_own_seeds(tmp_path):
    """One more seed of a network changes that network alone; one more pair changes nothing."""
    grid = [made_run(model, seed) for model in ("plain34", "resnet34") for seed in (0, 1)]
    alone = rh.ablation_table(save(tmp_path / "a", *grid)).loc["34 layers"]
    more = [made_run("resnet34", 2, last=0.1), made_run("plain50"), made_run("resnet50")]
    table = rh.ablation_table(save(tmp_path / "b", *grid, *more))
    row, kept = table.loc["34 layers"], [name for name in alone.index if name.startswith("plain")]
    pd.testing.assert_series_equal(row[kept], alone[kept], check_names=False)
    assert row["residual seeds"] == 3 and row.residual == pytest.approx((0.7 + 0.72 + 0.1) / 3)
    one = table.loc["50 layers"]
    assert one["plain seeds"] == 1 and one[["plain sd", "low", "high"]].isna().all()
    assert one.difference == pytest.approx(0.18)


def test_seeds_that_all_end_equal_are_no_warning(tmp_path):
    """As where each run gives all images the same class."""
    runs = save(tmp_path, *(made_run("plain34", seed, last=0.505) for seed in range(3)),
                *(made_run("resnet34", seed, last=0.6 + 0.1 * seed) for seed in range(3)))
    with warnings.catch_warnings(action="error"):
        row = rh.ablation_table(runs).loc["34 layers"]
    assert row.difference == pytest.approx(0.195) and row.low < 0 < row.high


def test_each_network_at_its_own_rate(tmp_path):
    runs = save(tmp_path, *(made_run(model, last=0.5 + rate, learning_rate=rate)
                            for model in ("plain34", "resnet34") for rate in (0.1, 0.2)))
    with pytest.raises(ValueError, match="one learning rate") as error:
        rh.ablation_table(runs)
    for rate in (0.1, 0.2):
        assert f"plain34-test-learning_rate_{rate}-seed0.json" in str(error.value)
    own = runs[runs.learning_rate == runs.model.map({"plain34": 0.1, "resnet34": 0.2})]
    row = rh.ablation_table(own).loc["34 layers"]
    assert (row.plain, row.residual) == (pytest.approx(0.6), pytest.approx(0.7))
    assert (row["plain rate"], row["residual rate"]) == (0.1, 0.2)


def test_zero_gamma_is_a_third_arm(tmp_path):
    zero_gamma = made_run("resnet34", last=0.8, zero_gamma=True)
    table = rh.ablation_table(save(tmp_path, made_run("plain34"), made_run("resnet34"), zero_gamma))
    assert list(table.index) == ["34 layers", "34 layers, zero gamma"]


def test_a_mirrored_network_is_compared_with_its_mirrored_twin(tmp_path):
    table = rh.ablation_table(save(
        tmp_path, made_run("plain34"), made_run("resnet34"),
        made_run("resnet34", last=0.65, shortcut_scale=0.5),
        made_run("plain34", last=0.75, mirrored=1), made_run("resnet34", last=0.8, mirrored=1),
        made_run("plain34", last=0.3, mirrored=0.5), made_run("resnet34", last=0.7, mirrored=0.5)))
    expected = {"34 layers": 0.1, "34 layers, shortcut scale 0.5": 0.05,
                "34 layers, mirrored": 0.05, "34 layers, mirrored 0.5": 0.4}
    assert table.difference.to_dict() == pytest.approx(expected)


def test_every_pair_of_twins_has_a_row(tmp_path):
    """None takes the place of another: two stems are two pairs."""
    table = rh.ablation_table(save(
        tmp_path, made_run("plain34"), made_run("resnet34"),
        made_run("plain34", last=0.1, stem="cifar"), made_run("resnet34", last=0.3, stem="cifar")))
    assert sorted(table.difference) == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("profile", ["full", "quick", "a profile of another time"])
def test_the_table_does_not_depend_on_the_profile(tmp_path, monkeypatch, profile):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"))
    expected = rh.ablation_table(runs)
    monkeypatch.setenv("RESNET_PROFILE", profile)
    pd.testing.assert_frame_equal(rh.ablation_table(rh.read_runs(tmp_path)), expected)


def test_every_change_names_its_file(monkeypatch):
    changes = [{}, {"learning_rate": 3e-4}, {"shortcut": "zero_pad"}, {"epochs": 45},
               {"optimizer": "sgd"}, {"stem": "cifar"}, {"stride_in": "3x3"}, {"batch_size": 32},
               {"image_size": 64}, {"zero_gamma": True}, {"mirrored": 1}, {"shortcut_scale": 0.5},
               {"profile": "quick"}, {"profile": "test"}, {"dataset": "/my/pictures"}, {"seed": 1}]
    monkeypatch.setitem(rh.SIZES, "/my/pictures", (200, 100))
    names = [rh.run_path(rh.make_config("resnet34", **change)).name for change in changes]
    assert names[:3] == ["resnet34-seed0.json", "resnet34-learning_rate_0.0003-seed0.json",
                         "resnet34-shortcut_zero_pad-seed0.json"]
    assert len(set(names)) == len(names)
    assert "resnet34-quick-seed0.json" in names and "resnet34-test-seed0.json" in names
    small = rh.make_config("resnet34", stem="cifar", image_size=16)  # smaller than another stem's
    assert rh.run_path(small).name == "resnet34-image_size_16-stem_cifar-seed0.json"
    as_in_the_paper = rh.make_config("resnet20", shortcut="zero_pad")
    assert rh.run_path(as_in_the_paper).name == "resnet20-seed0.json"


def test_a_configuration_survives_json_and_numpy():
    config = rh.make_config("resnet34", seed=np.int64(3), learning_rate=np.float32(0.5))
    assert rh.make_config(**json.loads(json.dumps(config))) == config
    assert type(config["seed"]) is int


def test_no_runs_and_foreign_files(tmp_path):
    (tmp_path / ".resnet34-seed0.json").write_text('{"model": "half wr')  # being written, or killed
    with pytest.raises(FileNotFoundError, match="No runs in"):
        rh.read_runs(tmp_path)
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="foreign.json is damaged or another file"):
        rh.read_runs(tmp_path)
    assert (tmp_path / "foreign.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("part", ["config", "status", "history", "environment"])
def test_a_run_with_a_part_missing_is_named(tmp_path, part):
    save(tmp_path, made_run("plain34"))
    run = made_run("resnet34")
    path = rh.run_path(run["config"], tmp_path)
    del run[part]
    path.write_text(json.dumps(run))
    for read in (lambda: rh.read_run(path), lambda: rh.read_runs(tmp_path)):
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            read()


@pytest.mark.parametrize("part, entry, value", [
    ("config", "model", "resnet35"), ("config", "stem", None), ("config", "batch_size", None),
    ("config", "seed", None), ("environment", "device", None), ("environment", "backend", None),
    ("environment", "images_crc32", None), (None, "status", "training"), (None, "status", None)])
def test_a_run_with_a_wrong_or_missing_entry_is_named(tmp_path, part, entry, value):
    """Otherwise it would be left out of a table, or compared with what it does not equal."""
    run = made_run("resnet34")
    path = rh.run_path(run["config"], tmp_path)
    (run[part] if part else run)[entry] = value
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=f"{path.name} is damaged or another file"):
        rh.read_runs(tmp_path)
    (run[part] if part else run).pop(entry)
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=f"{path.name} is damaged or another file"):
        rh.read_runs(tmp_path)


def test_a_run_without_an_epoch_is_named(tmp_path):
    """It would vanish from a table that has a row per epoch."""
    run = made_run("resnet34", status="diverged")
    run["history"] = {key: [] for key in rh.HISTORY}
    with pytest.raises(ValueError, match="resnet34-test-seed0.json is damaged or another file"):
        save(tmp_path, run)


def test_an_unknown_metric_is_named(tmp_path):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"))
    with pytest.raises(ValueError, match="metric out of loss, .*'val_acc'"):
        rh.ablation_table(runs, "val_acc")


def test_a_run_that_is_there_twice_is_not_drawn(tmp_path):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"))
    with pytest.raises(ValueError, match="one run per network and seed.*plain34-test-seed0.json"):
        rh.plot_histories(pd.concat([runs, runs.query("model == 'plain34'")]))


def test_figures_are_opaque_white_png(tmp_path):
    import matplotlib.pyplot as plt

    runs = save(tmp_path, *(made_run(model, seed) for model in ACCURACY for seed in (0, 1)))
    figure = rh.plot_histories(runs)
    figure.savefig(tmp_path / "figure.png")
    assert (plt.imread(tmp_path / "figure.png")[0, 0] == 1).all()
    plt.close(figure)


def test_one_colour_per_network_solid_training_dashed_validation(tmp_path):
    import matplotlib.colors
    import matplotlib.pyplot as plt

    figure = rh.plot_histories(save(tmp_path, *(made_run(model) for model in ACCURACY)))
    for axis, depth in zip(figure.axes, (34, 50, 34, 50)):
        lines = [line for line in axis.get_lines() if len(line.get_xdata())]
        styles = {(matplotlib.colors.to_hex(line.get_color()), line.is_dashed()) for line in lines}
        assert styles == {(rh.COLOURS[f"{kind}{depth}"], dashed)
                          for kind in ("plain", "resnet") for dashed in (False, True)}
        assert {text.get_text(): text.get_color() for text in axis.texts} == {
            rh.display_name(f"{kind}{depth}"): rh.COLOURS[f"{kind}{depth}"]
            for kind in ("plain", "resnet")}
    plt.close(figure)


def test_curves_of_a_run_that_diverged_at_once(tmp_path):
    import matplotlib.pyplot as plt

    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"))
    runs.loc[runs.model == "plain34", ["loss", "accuracy"]] = np.nan
    figure = rh.plot_histories(runs)
    assert [text.get_text() for text in figure.axes[0].texts] == ["ResNet-34"]
    plt.close(figure)


@pytest.mark.parametrize("change", [{"learning_rate": 0.1}, {"mirrored": 1}, {"epochs": 3},
                                    {"shortcut": "zero_pad"}])
def test_curves_of_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, change):
    runs = save(tmp_path, made_run("resnet34"), made_run("resnet34", 1, **change))
    with pytest.raises(ValueError, match=next(iter(change))):
        rh.plot_histories(runs)


def test_colours_tell_kind_and_depth():
    import matplotlib.colors

    for model, colour in rh.COLOURS.items():
        red, _, blue = matplotlib.colors.to_rgb(colour)
        assert (red > blue) == model.startswith("plain"), model
    for family in ([18, 34, 50, 101, 152], [20, 32, 44, 56, 110]):
        networks = [f"{kind}{depth}" for depth in family for kind in ("plain", "resnet")]
        assert len({rh.COLOURS[network] for network in networks}) == 10


def test_saved_model_loads(tmp_path):
    model = rh.create_model("resnet18", seed=1)
    model.save(tmp_path / "net.keras")
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype="float32")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(model(images), loaded(images))


def test_the_helper_can_be_read_in_one_sitting():
    text = pathlib.Path(rh.__file__).read_text()
    lines = text.splitlines()
    assert len(lines) <= 1182 and max(map(len, lines)) <= 100


PLANNED = ["model", "shortcut", "optimizer", "learning_rate", "seed", "epochs", "zero_gamma",
           "mirrored", "shortcut_scale"]


def test_every_run_has_its_row_in_the_plan():
    plan = pd.read_csv(rh.COMMITTED / "plan.csv")
    rows = plan[PLANNED].astype(str).agg(" ".join, axis=1)
    assert rows.is_unique and (plan.minutes > 0).all()
    configs = [rh.make_config(profile="full", **row) for row in plan[PLANNED].to_dict("records")]
    paths = {rh.run_path(config).name for config in configs}
    assert len(paths) == len(plan)
    committed = {path.name for path in (rh.COMMITTED / "full" / "cats_vs_dogs").glob("*.json")}
    assert len(committed) > 50 and committed <= paths
