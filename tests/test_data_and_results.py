"""The data (a tiny cats_vs_dogs in TFDS's own format) and what is saved, read back, compared and refused."""

import hashlib
import json
import pathlib

import keras
import numpy as np
import pandas as pd
import pytest
import resnet_helpers as rh
from notebook_code import format_percent


def test_split_sizes_values_and_one_decoding(tiny_cats, capsys):
    data = rh.load_data()
    assert (len(data.train_labels), len(data.val_labels)) == (140, 60)
    assert list(data.class_names) == ["cat", "dog"] and data.train_images.dtype == np.uint8
    assert data.train_images.shape == (140, 32, 32, 3)
    # A cat of the tiny data set is red, a dog blue: the images still belong to their labels.
    for images, labels in ((data.train_images, data.train_labels), (data.val_images, data.val_labels)):
        assert ((images[..., 2].mean((1, 2)) > images[..., 0].mean((1, 2))) == labels).all()
    assert "Decoding" in capsys.readouterr().out
    rh.load_data.cache_clear()
    again = rh.load_data()
    assert "Decoding" not in capsys.readouterr().out
    assert (again.train_images == data.train_images).all() and (again.class_names == data.class_names).all()


def test_resizing_is_that_of_the_notebook(tiny_cats):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    raw = next(iter(tfds.load("cats_vs_dogs", split="train[70%:]", data_dir=rh.data_dir())))["image"]
    small = tf.image.resize(raw, [32, 32], antialias=True).numpy() / 255
    assert abs(small - rh.normalize(rh.load_data().val_images[0])).max() <= 0.5001 / 255


def test_normalize():
    images = np.array([0, 51, 255], "uint8")
    assert rh.normalize(images).dtype == np.float32
    np.testing.assert_allclose(rh.normalize(images), [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]])
def test_a_damaged_file_of_images_is_named(tiny_cats, damage):
    expected = rh.load_data().train_images
    (path,) = (tiny_cats / "cache").glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    rh.load_data.cache_clear()
    with pytest.raises(ValueError, match="npz is damaged .*Move it away"):
        rh.load_data()
    path.unlink()
    assert (rh.load_data().train_images == expected).all()


def test_images_that_cannot_be_kept_are_an_error(tiny_cats, monkeypatch):
    (tiny_cats / "file").write_text("")
    monkeypatch.setenv("RESNET_DATA", str(tiny_cats / "file"))  # not a folder: nothing can be written into it
    with pytest.raises(OSError, match="Cannot write .*RESNET_DATA"):
        rh.load_data()


def test_decoded_images_need_no_prepared_data_set(tiny_cats, monkeypatch):
    expected = rh.load_data().train_images
    rh.load_data.cache_clear()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_cats / "none"))
    assert rh.prepare_dataset("full") == "cats_vs_dogs"
    assert (rh.load_data().train_images == expected).all()
    with pytest.raises(FileNotFoundError, match="cats_vs_dogs is not in .*prepare_dataset"):
        rh.load_data(image_size=64)
    (path,) = (tiny_cats / "cache").glob("*.npz")
    path.write_bytes(path.read_bytes()[:-1000])
    rh.load_data.cache_clear()
    with pytest.raises(ValueError, match="npz is damaged"):  # nothing to decode it from
        rh.load_data()


def test_no_images_is_an_error():
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"a label per image. Received: 0 for {count}"):
            rh.Batches(np.zeros((count, 32, 32, 3)), np.zeros(0))


def test_the_newest_version_is_a_number_and_not_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version in ("4.0.9", "4.0.10"):
        (tmp_path / "cats_vs_dogs" / version).mkdir(parents=True)
        (tmp_path / "cats_vs_dogs" / version / "dataset_info.json").write_text(version)
    assert hashlib.sha256(b"4.0.10").hexdigest()[:8] in rh._decoded("cats_vs_dogs", 32).name


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
    rh.load_data.cache_clear()
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
    (lambda: rh.make_config("plain34", shortcut="projection"), "shortcut out of none. Received: 'projection'"),
    (lambda: rh.make_config("resnet18", optimizer="lion"), "optimizer out of adam, sgd. Received: 'lion'"),
])
def test_errors_name_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_profiles_are_what_the_readme_says():
    assert rh.PROFILES["full"] == {"train_images": 16_283, "val_images": 6_979, "epochs": 15}
    quick = rh.PROFILES["quick"]
    assert quick == {"train_images": 1_280, "val_images": 512, "epochs": 4, "batch_size": 32}


ACCURACY = {"plain34": [0.60, 0.64], "resnet34": [0.70, 0.72], "plain50": [0.50, 0.54], "resnet50": [0.68, 0.66]}


def made_run(model, seed=0, last=None, status="finished", **changes):
    config = rh.make_config(model, "test", seed=seed, **changes)
    last = ACCURACY[model][seed] if last is None else last
    history = {key: [0.5, last] for key in rh.HISTORY}
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
    assert len(runs) == 16 and set(runs.epoch) == {1, 2}
    table = rh.ablation_table(runs)
    assert list(table.index) == ["34 layers", "50 layers"] and list(table.seeds) == [2, 2]
    np.testing.assert_allclose(table.plain, [0.62, 0.52])
    np.testing.assert_allclose(table.residual, [0.71, 0.67])
    np.testing.assert_allclose(table.difference, [0.09, 0.15])
    np.testing.assert_allclose(table["difference sd"], np.std([[0.10, 0.08], [0.18, 0.12]], axis=1, ddof=1))
    # t(0.975, one degree of freedom) = 12.706
    np.testing.assert_allclose(table["95% half width"], 12.7062 * table["difference sd"] / 2**0.5, rtol=1e-5)
    assert format_percent(table).loc["34 layers", "residual"] == "71.0 ± 1.4"
    back = pd.read_csv(pd.io.common.StringIO(table.to_csv()), index_col=0)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    words = format_percent(table).to_markdown().splitlines()[2].split()
    assert words[:8] == "| 34 layers | 62.0 ± 2.8 |".split()


def test_a_shortcut_without_parameters_has_its_own_row(tmp_path):
    zero_pad = made_run("resnet34", last=0.8, shortcut="zero_pad")
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"), zero_pad)
    table = rh.ablation_table(runs)
    assert list(table.index) == ["34 layers", "34 layers, zero_pad"]
    np.testing.assert_allclose(table.difference, [0.1, 0.2])


def test_diverged_runs_have_no_number(tmp_path):
    diverged = made_run("plain34", status="diverged")
    diverged["history"]["loss"][1] = None
    table = rh.ablation_table(save(tmp_path, diverged, made_run("resnet34")))
    assert list(format_percent(table).loc["34 layers"]) == ["diverged", "70.0", "diverged"]


@pytest.mark.parametrize("change, file", [({"epochs": 3}, "resnet34-epochs_3-seed0.json"),
                                          ({"learning_rate": 0.1}, "resnet34-learning_rate_0.1-seed0.json"),
                                          ({"train_images": 95}, "resnet34-train_images_95-seed0.json"),
                                          ({"stem": "cifar"}, "resnet34-stem_cifar-seed0.json"),
                                          ({"optimizer": "sgd"}, "resnet34-optimizer_sgd-seed0.json")])
def test_unequal_runs_are_refused_by_name(tmp_path, change, file):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34", **change))
    with pytest.raises(ValueError, match=rf"differ in {next(iter(change))} ") as error:
        rh.ablation_table(runs)
    assert "plain34-seed0.json" in str(error.value) and file in str(error.value)


def test_unequal_machines_and_a_missing_twin_are_refused(tmp_path):
    for key in ("device", "images_crc32", "labels_crc32"):
        plain, other = made_run("plain34"), made_run("resnet34")
        plain["environment"]["labels_crc32"] = 7
        other["environment"] |= {"labels_crc32": 7, key: "another"}
        with pytest.raises(ValueError, match=f"differ in {key} .*plain34-seed0.json.*resnet34-seed0.json"):
            rh.ablation_table(save(tmp_path / key, plain, other))
    with pytest.raises(ValueError, match="runs of plain34 beside resnet34. Received: .'resnet34'."):
        rh.ablation_table(save(tmp_path / "alone", made_run("resnet34")))


def test_a_run_without_a_checksum_of_the_labels_is_comparable(tmp_path):
    old, new = made_run("plain34"), made_run("resnet34")
    new["environment"]["labels_crc32"] = 7
    assert rh.ablation_table(save(tmp_path, old, new)).difference.item() == pytest.approx(0.1)


def test_each_pair_has_its_own_seeds(tmp_path):
    """One more seed of one network, or one more network of one seed, leaves everything else as it was."""
    grid = [made_run(model, seed) for model in ("plain34", "resnet34") for seed in (0, 1)]
    alone = rh.ablation_table(save(tmp_path / "a", *grid))
    more = [made_run("resnet34", 2, last=0.1), made_run("plain50"), made_run("resnet50")]
    table = rh.ablation_table(save(tmp_path / "b", *grid, *more))
    pd.testing.assert_frame_equal(table.loc[["34 layers"]], alone)
    assert table.seeds["50 layers"] == 1 and np.isnan(table["95% half width"]["50 layers"])


def test_each_network_at_its_own_rate(tmp_path):
    runs = save(tmp_path, *(made_run(model, last=0.5 + rate, learning_rate=rate)
                            for model in ("plain34", "resnet34") for rate in (0.1, 0.2)))
    with pytest.raises(ValueError, match="differ in learning_rate"):
        rh.ablation_table(runs)
    table = rh.ablation_table(runs, rates={"plain34": 0.1, "resnet34": 0.2})
    assert (table.plain.item(), table.residual.item()) == (pytest.approx(0.6), pytest.approx(0.7))


def test_zero_gamma_is_a_third_arm(tmp_path):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"), made_run("resnet34", last=0.8, zero_gamma=True))
    assert list(rh.ablation_table(runs).index) == ["34 layers", "34 layers, zero gamma"]


def test_every_change_names_its_file():
    changes = [{}, {"learning_rate": 3e-4}, {"shortcut": "zero_pad"}, {"epochs": 45}, {"optimizer": "sgd"},
               {"stem": "cifar"}, {"stride_in": "3x3"}, {"batch_size": 32}, {"image_size": 64}, {"zero_gamma": True}]
    names = [rh.run_path(rh.make_config("resnet34", **change)).name for change in changes]
    assert names[:3] == ["resnet34-seed0.json", "resnet34-learning_rate_0.0003-seed0.json",
                         "resnet34-shortcut_zero_pad-seed0.json"]
    assert len(set(names)) == len(names)
    assert rh.run_path(rh.make_config("resnet20", shortcut="zero_pad")).name == "resnet20-seed0.json"  # as in the paper


def test_a_configuration_survives_json_and_numpy():
    config = rh.make_config("resnet34", seed=np.int64(3), learning_rate=np.float32(0.5))
    assert rh.make_config(**json.loads(json.dumps(config))) == config and type(config["seed"]) is int


def test_no_runs_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No runs in"):
        rh.read_runs(tmp_path)
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="foreign.json is damaged or another file"):
        rh.read_runs(tmp_path)
    assert (tmp_path / "foreign.json").read_text() == '{"a": 1}'


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
        networks = f"plain{depth}", f"resnet{depth}"
        assert styles == {(rh.COLOURS[model], dashed) for model in networks for dashed in (False, True)}
    plt.close(figure)


def test_colours_tell_kind_and_depth():
    import matplotlib.colors

    for model, colour in rh.COLOURS.items():
        red, _, blue = matplotlib.colors.to_rgb(colour)
        assert (red > blue) == model.startswith("plain"), model
    for family in ([18, 34, 50, 101, 152], [20, 32, 44, 56, 110]):
        assert len({rh.COLOURS[f"{kind}{depth}"] for depth in family for kind in ("plain", "resnet")}) == 10


def test_saved_model_loads(tmp_path):
    model = rh.create_model("resnet18", seed=1)
    model.save(tmp_path / "net.keras")
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype="float32")
    np.testing.assert_array_equal(model(images), keras.models.load_model(tmp_path / "net.keras")(images))


def test_the_helper_can_be_read_in_one_sitting():
    text = pathlib.Path(rh.__file__).read_text()
    lines = text.splitlines()
    assert len(lines) <= 800 and max(map(len, lines)) <= 110


PLANNED = ["model", "shortcut", "optimizer", "learning_rate", "seed", "epochs", "zero_gamma", "mirrored",
           "shortcut_scale"]


def test_every_run_has_its_row_in_the_plan():
    plan = pd.read_csv(pathlib.Path(rh.__file__).parent / "results" / "plan.csv")
    rows = plan[PLANNED].astype(str).agg(" ".join, axis=1)
    assert rows.is_unique and (plan.minutes > 0).all()
    paths = {rh.run_path(rh.make_config(profile="full", **row)).name for row in plan[PLANNED].to_dict("records")}
    assert len(paths) == len(plan)
    committed = {path.name for path in (pathlib.Path(rh.__file__).parent / "results/full/cats_vs_dogs").glob("*.json")}
    assert len(committed) > 50 and committed <= paths
