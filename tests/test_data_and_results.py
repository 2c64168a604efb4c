"""The data (a tiny cats_vs_dogs in TFDS's own format) and what is saved, read back, compared and refused."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
import resnet_helpers as rh


def test_split_sizes_values_and_one_decoding(tiny_cats, capsys):
    data = rh.load_data()
    assert (len(data.train_labels), len(data.val_labels)) == (140, 60)
    assert data.class_names == ("cat", "dog") and data.train_images.dtype == np.uint8
    assert data.train_images.shape == (140, 32, 32, 3)
    # A cat of the tiny data set is red, a dog blue: the images still belong to their labels.
    for images, labels in ((data.train_images, data.train_labels), (data.val_images, data.val_labels)):
        assert ((images[..., 2].mean((1, 2)) > images[..., 0].mean((1, 2))) == labels).all()
    assert "Decoding" in capsys.readouterr().out
    rh.load_data.cache_clear()
    again = rh.load_data()
    assert "Decoding" not in capsys.readouterr().out
    assert (again.train_images == data.train_images).all() and again.class_names == data.class_names


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
def test_damaged_cache_is_decoded_again(tiny_cats, damage, capsys):
    expected = rh.load_data().train_images
    (path,) = (tiny_cats / "cache").glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    rh.load_data.cache_clear()
    assert (rh.load_data().train_images == expected).all()
    assert "damaged" in capsys.readouterr().out


def test_no_images_is_an_error(tiny_cats, tmp_path, monkeypatch):
    empty = {"class_names": np.array(["cat", "dog"])} | {
        name: np.zeros((0, 32, 32, 3) if "images" in name else 0, "uint8") for name in rh.Data._fields[1:]}
    np.savez(tmp_path / "empty.npz", **empty)
    monkeypatch.setenv("RESNET_DATA", str(tmp_path / "empty.npz"))
    rh.load_data.cache_clear()
    with pytest.raises(ValueError, match="No images. Received: 0 for training, 0 for validation"):
        rh.load_data()
    with pytest.raises(ValueError, match="Received: 0 and 0"):
        rh.Batches(np.zeros((0, 32, 32, 3)), np.zeros(0))


def test_without_network_full_stops_and_quick_uses_digits(tmp_path, monkeypatch, capsys):
    import requests

    def no_network(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match="cats_vs_dogs is not prepared in .*TFDS_DATA_DIR.*RESNET_PROFILE=quick"):
        rh.prepare_dataset("full")
    assert rh.prepare_dataset("quick") == rh.DIGITS == rh.prepare_dataset("quick")
    assert capsys.readouterr().out.count("NO CATS, NO DOGS") == 2
    monkeypatch.setenv("RESNET_CACHE", str(tmp_path / "cache"))
    rh.load_data.cache_clear()
    data = rh.load_data(rh.DIGITS)
    assert len(data.train_labels) + len(data.val_labels) == 1797 and len(data.class_names) == 10
    config = rh.make_config("resnet34", "quick", rh.DIGITS)
    assert (config["train_images"], config["val_images"]) == (len(data.train_labels), len(data.val_labels))
    assert "sklearn_digits" in str(rh.run_path(config)) and "cats" not in str(rh.run_path(config))


@pytest.mark.parametrize("call, words", [
    (lambda: rh.get_profile("fast"), "Received: 'fast'. Allowed: full, quick, test"),
    (lambda: rh.make_config("resnet35"), "Received: 'resnet35'. Allowed: plain18, resnet18"),
    (lambda: rh.make_config("resnet34", epoch=3), "Received: 'epoch'. Allowed: image_size, batch_size"),
    (lambda: rh.make_config("resnet34", schedule="constant"), "Received: 'schedule'. Allowed: image_size"),
    (lambda: rh.make_config("resnet34", shortcut="none"), "Received: 'none'. Allowed: zero_pad, projection"),
    (lambda: rh.make_config("plain34", shortcut="projection"), "Received: 'projection'. Allowed: none"),
    (lambda: rh.build_from_config(rh.make_config("resnet18", optimizer="lion"), 2), "Received: 'lion'. Allowed: adam"),
])
def test_errors_name_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_profiles_are_what_the_readme_says():
    assert rh.PROFILES["full"] == {"train_images": 16_283, "val_images": 6_979, "epochs": 15}
    quick = rh.PROFILES["quick"]
    assert quick["train_images"] <= 2_048 and quick["val_images"] <= 1_024 and quick["epochs"] == 3


ACCURACY = {"plain34": [0.60, 0.64], "resnet34": [0.70, 0.72], "plain50": [0.50, 0.54], "resnet50": [0.68, 0.66]}


def made_run(model, seed=0, last=None, status="finished", **changes):
    config = rh.make_config(model, "test", seed=seed, **changes)
    last = ACCURACY[model][seed] if last is None else last
    history = {key: [0.5, last] for key in rh.HISTORY}
    history["val_accuracy"][0] = 0.9  # the best epoch is not the last one
    environment = {"backend": "tensorflow", "device": "CPU x86_64", "images_crc32": 1}
    return {"config": config, "status": status, "history": history, "environment": environment}


def save(folder, *runs):
    for run in runs:
        rh._write_run(rh.run_path(run["config"], folder), run)
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
    assert rh.percent_table(table).loc["34 layers", "residual"] == "71.0 ± 1.4"
    np.testing.assert_allclose(rh.ablation_table(runs, epoch="best").residual, 0.9)
    back = pd.read_csv(pd.io.common.StringIO(table.to_csv()), index_col=0)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert rh.to_markdown(rh.percent_table(table)).splitlines()[2].startswith("| 34 layers | 62.0 ± 2.8 | 71.0 ± 1.4 |")


def test_a_shortcut_without_parameters_has_its_own_row(tmp_path):
    zero_pad = made_run("resnet34", last=0.8, shortcut="zero_pad")
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"), zero_pad)
    table = rh.ablation_table(runs)
    assert list(table.index) == ["34 layers", "34 layers (zero_pad)"]
    np.testing.assert_allclose(table.difference, [0.1, 0.2])


def test_diverged_runs_have_no_number(tmp_path):
    diverged = made_run("plain34", status="diverged")
    diverged["history"]["loss"][1] = float("nan")
    table = rh.ablation_table(save(tmp_path, diverged, made_run("resnet34")))
    assert list(rh.percent_table(table).loc["34 layers"]) == ["diverged", "70.0", "diverged"]
    json.loads(next(tmp_path.glob("plain*")).read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("change, file", [({"epochs": 3}, "resnet34-seed0.json"),
                                          ({"learning_rate": 0.1}, "resnet34-rate0.1-seed0.json"),
                                          ({"train_images": 95}, "resnet34-seed0.json"),
                                          ({"optimizer": "sgd"}, "resnet34-seed0.json")])
def test_unequal_runs_are_refused_by_name(tmp_path, change, file):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34", **change))
    with pytest.raises(ValueError, match=rf"differ in {next(iter(change))} ") as error:
        rh.ablation_table(runs)
    assert "plain34-seed0.json" in str(error.value) and file in str(error.value)


def test_unequal_machines_seeds_and_a_missing_twin_are_refused(tmp_path):
    other = made_run("resnet34")
    other["environment"]["device"] = "GPU"
    with pytest.raises(ValueError, match="differ in device"):
        rh.ablation_table(save(tmp_path / "a", made_run("plain34"), other))
    with pytest.raises(ValueError, match="not the same seeds"):
        rh.ablation_table(save(tmp_path / "b", made_run("plain34"), made_run("resnet34", 1)))
    with pytest.raises(ValueError, match="No run of plain34 .*resnet34-seed0.json"):
        rh.ablation_table(save(tmp_path / "c", made_run("resnet34")))


def test_incomplete_seeds_are_left_out_and_named(tmp_path, capsys):
    runs = save(tmp_path, made_run("plain34"), made_run("resnet34"), made_run("plain34", 1))
    assert set(rh.complete_seeds(runs).seed) == {0}
    assert "plain34-seed1.json" in capsys.readouterr().out


def test_the_folder_is_that_of_the_photographs_before_that_of_the_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(rh, "RESULTS", tmp_path)
    assert rh.results_folder("quick") == tmp_path / "quick" / "cats_vs_dogs"
    for dataset in (rh.DIGITS, "cats_vs_dogs"):
        save(tmp_path / "quick" / dataset, made_run("plain34"))
        assert rh.results_folder("quick") == tmp_path / "quick" / dataset


def test_runs_of_one_seed_at_other_rates_and_shortcuts_do_not_share_a_file():
    changes = [{}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3}, {"shortcut": "zero_pad"}]
    names = [rh.run_path(rh.make_config("resnet34", **change)).name for change in changes]
    assert names == ["resnet34-seed0.json", "resnet34-rate0.0003-seed0.json", "resnet34-rate0.003-seed0.json",
                     "resnet34-zero_pad-seed0.json"]


def test_no_runs_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No runs in"):
        rh.read_runs(tmp_path)
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="foreign.json is damaged or not a run's file"):
        rh.read_runs(tmp_path)
    assert (tmp_path / "foreign.json").read_text() == '{"a": 1}'


def test_figures_are_opaque_white_png(tmp_path):
    import matplotlib.pyplot as plt

    runs = save(tmp_path, *(made_run(model, seed) for model in ACCURACY for seed in (0, 1)))
    images = rh.plot_images(np.zeros((3, 8, 8, 3)), [0, 1, 0], "ab", "")
    for figure in (rh.plot_histories(runs), rh.plot_depths(runs), images):
        rh.save_figure(figure, tmp_path / "figure.png")
        corner = plt.imread(tmp_path / "figure.png")[0, 0]
        assert (corner == 1).all()
        plt.close(figure)


def test_one_colour_per_net_solid_training_dashed_validation(tmp_path):
    import matplotlib.pyplot as plt

    figure = rh.plot_histories(save(tmp_path, *(made_run(model) for model in ACCURACY)))
    for axis, depth in zip(figure.axes, (34, 50, 34, 50)):
        styles = {(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}
        nets = f"plain{depth}", f"resnet{depth}"
        assert styles == {(rh.COLOURS[model], style) for model in nets for style in ("-", "--")}
    plt.close(figure)


def test_signal_figure_takes_any_nets():
    import matplotlib.pyplot as plt

    signals = pd.DataFrame({"signal": [1.0, 2.0], "gradient": [0.1, 0.2]})
    figure = rh.plot_signals({"resnet34": signals, "plain50": signals}, "gradient", "")
    assert [[line.get_color() for line in axis.get_lines()] for axis in figure.axes] == [
        [rh.COLOURS["resnet34"]], [rh.COLOURS["plain50"]]]
    plt.close(figure)


def test_saved_model_loads(tmp_path):
    model = rh.create_model("resnet18", seed=1)
    model.save(tmp_path / "net.keras")
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype="float32")
    np.testing.assert_array_equal(model(images), keras.models.load_model(tmp_path / "net.keras")(images))
