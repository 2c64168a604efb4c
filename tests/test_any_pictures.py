"""Other pictures than cats and dogs: a name of TensorFlow Datasets, a folder, the digits."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import resnet_helpers as rh
from PIL import Image

COLOURS = {"blue": 2, "green": 1, "red": 0}  # the classes of the folder, and their channels
FORMATS = [("L", ".png"), ("RGB", ".jpg"), ("RGB", ".PNG"), ("RGBA", ".png"), ("RGB", ".jpeg")]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for all that is kept; nothing can be downloaded."""
    folders = {"TFDS_DATA_DIR": "tfds", "RESNET_DATA": "cache", "RESNET_RESULTS": "results"}
    for variable, name in folders.items():
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.delenv("RESNET_DATASET", raising=False)
    monkeypatch.setattr(rh, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    return tmp_path


def draw(file, mode, rng, channel):
    """A picture of one colour, gray where the mode is gray: brighter with a higher channel."""
    width, height = map(int, rng.integers(33, 60, 2))
    pixel = [20, 20, 20]
    pixel[channel] = 220
    colours = {"L": 60 * (channel + 1), "RGB": tuple(pixel), "RGBA": (*pixel, 255)}
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), colours[mode]).save(file)


@pytest.fixture
def folder(places):
    """Three classes of 10 pictures of several sizes and formats, and what is no picture."""
    rng = np.random.default_rng(0)
    root = places / "my photos"
    for colour, channel in COLOURS.items():
        for i in range(10):
            mode, suffix = FORMATS[i % len(FORMATS)]
            draw(root / colour / f"{i}{suffix}", mode, rng, channel)
        (root / colour / "notes.txt").write_text("no picture")
        (root / colour / "._1.png").write_text("what some systems leave beside a picture")
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("no class")
    return str(root)


def store(name, features, examples, split="train"):
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name, "1.0.0", tfds.features.FeaturesDict(features), {split: enumerate(examples)},
        data_dir=rh.data_dir())


@pytest.fixture
def gray(places):
    """A prepared data set of gray 28x28 images: class i has pixels of about 40 + 80 i."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    features = {"image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(names=["dark", "medium", "bright"])}
    examples = [{"image": rng.integers(30, 50, (28, 28, 1)).astype("uint8") + np.uint8(80 * label),
                 "label": label} for label in labels]
    store("gray_things", features, examples)
    return "gray_things"


def labels_and_images(data):
    return [(data.class_names[label], image.astype(int)) for images, labels in (
        (data.train_images, data.train_labels), (data.val_images, data.val_labels))
        for image, label in zip(images, labels)]


def check_run(name, classes, images):
    """Sizes of configurations, and a run in a folder of its own, whose table tells the classes."""
    full = rh.make_config("resnet20", "full", name)
    assert (full["train_images"], full["val_images"], full["epochs"]) == (*images, 15)
    config = rh.make_config("resnet20", "test", name, epochs=1)
    assert config["train_images"] == min(96, images[0])
    assert config["val_images"] == min(48, images[1])
    config = rh.make_config("resnet20", "test", name, epochs=1, train_images=16, val_images=8,
                            batch_size=8)
    run = rh.train_run(config, verbose=False)
    path = rh.run_path(config)
    own = name.split("/")[-1]
    assert path.exists() and path.parent == rh.results_folder("test", name)
    assert path.parent.parent == rh.RESULTS / "test" and path.parent.name.startswith(own)
    assert path.name.startswith(f"resnet20-{own}") and path.name.endswith("-seed0.json")
    assert "cats" not in str(path.relative_to(rh.RESULTS))
    assert run["environment"]["classes"] == classes and run["config"]["dataset"] == name
    assert set(rh.read_runs(path.parent).classes) == {classes}


@pytest.mark.parametrize("shape, dtype", [((8, 8, 1), "uint16"), ((8, 8, 4), "uint8")])
def test_other_than_8_bits_gray_or_rgb_is_told_in_a_sentence(places, shape, dtype):
    """Scaled to 8 bits they would all be white."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=shape, dtype=np.dtype(dtype).type),
                "label": tfds.features.ClassLabel(names=["young", "old"])}
    store("portraits", features, [{"image": np.full(shape, 200, dtype), "label": 1}] * 10)
    with pytest.raises(ValueError, match=r"8 bits, gray or RGB. Received: Image\(shape="):
        rh.load_data("portraits")


def test_a_data_set_of_gray_images(gray):
    assert rh.prepare_dataset("full", gray) == gray  # without a network
    data = rh.load_data(gray)
    assert data.class_names.tolist() == ["dark", "medium", "bright"]
    assert data.train_images.shape == (35, 32, 32, 3) and data.val_images.shape == (15, 32, 32, 3)
    assert data.train_images.dtype == data.val_images.dtype == np.uint8
    for name, image in labels_and_images(data):
        assert abs(image.mean() - {"dark": 40, "medium": 120, "bright": 200}[name]) < 5
        assert (image == image[..., :1]).all()
    check_run(gray, 3, (35, 15))


def test_a_folder_of_pictures(folder, capsys, monkeypatch):
    monkeypatch.setenv("RESNET_DATASET", folder)
    assert rh.prepare_dataset("full") == rh.get_dataset() == folder
    data = rh.load_data()
    assert data.class_names.tolist() == sorted(COLOURS)
    assert data.train_images.shape == (21, 32, 32, 3) and data.val_images.shape == (9, 32, 32, 3)
    pictures = labels_and_images(data)
    assert [sum(name == colour for name, _ in pictures) for colour in COLOURS] == [10, 10, 10]
    for name, image in pictures:
        means = image.mean((0, 1))
        if means.max() - means.min() < 10:  # a gray one
            assert abs(means.mean() - 60 * (COLOURS[name] + 1)) < 3
        else:
            assert means.argmax() == COLOURS[name] and means.max() > 190
    assert len(set(data.train_labels)) == 3  # mixed, and not one class after the other
    check_run(folder, 3, (21, 9))
    assert capsys.readouterr().out.count("Decoding") == 1


def test_a_picture_is_turned_as_its_camera_notes(folder):
    """Red above, green below, saved turned by a quarter: tag 274 says 6."""
    picture = Image.new("RGB", (40, 60), (200, 0, 0))
    picture.paste((0, 200, 0), (0, 30, 40, 60))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    for file in pathlib.Path(folder, "red").iterdir():
        file.unlink()
    turned.save(pathlib.Path(folder, "red", "turned.png"), exif=exif)
    (image,) = [image for name, image in labels_and_images(rh.load_data(folder)) if name == "red"]
    assert image[:12, :, 0].min() > 150 and image[:12, :, 1].max() < 50
    assert image[-12:, :, 1].min() > 150 and image[-12:, :, 0].max() < 50


def test_the_same_folder_name_elsewhere_is_another_data_set(folder, places):
    other = str(places / "elsewhere" / pathlib.Path(folder).name)
    assert rh.results_folder("quick", folder) != rh.results_folder("quick", other)
    assert rh.get_dataset("~/my photos") == os.path.expanduser("~/my photos")


def test_a_new_picture_is_seen(folder, capsys):
    before = rh.load_data(folder)
    again = rh.load_data(folder)
    assert (again.train_images == before.train_images).all()
    rng = np.random.default_rng(1)
    draw(pathlib.Path(folder, "red", "new.jpg"), "RGB", rng, 0)
    after = rh.load_data(folder)
    assert len(after.train_images) + len(after.val_images) == 31
    assert capsys.readouterr().out.count("Decoding") == 2


def test_a_renamed_class_is_seen(folder):
    assert rh.load_data(folder).class_names.tolist() == ["blue", "green", "red"]
    pathlib.Path(folder, "red").rename(pathlib.Path(folder, "rot"))
    assert rh.load_data(folder).class_names.tolist() == ["blue", "green", "rot"]


def test_the_digits(places):
    assert rh.prepare_dataset("quick", rh.DIGITS) == rh.DIGITS
    data = rh.load_data(rh.DIGITS)
    assert data.class_names.tolist() == list("0123456789")
    assert len(data.train_images) == 1258 and len(data.val_images) == 539
    assert data.train_images.shape[1:] == data.val_images.shape[1:] == (32, 32, 3)
    pictures = labels_and_images(data)
    middle = {name: np.mean([image[12:20, 14:18].mean() for label, image in pictures
                             if label == name]) for name in "01"}
    assert middle["0"] < 60 and middle["1"] > 120  # a zero is empty in the middle, a one is not
    check_run(rh.DIGITS, 10, (1258, 539))


def spoil(root, how):
    red = pathlib.Path(root, "red")
    if how == "one class":
        for colour in ("blue", "green"):
            pathlib.Path(root, colour).rename(pathlib.Path(root, f".{colour}"))
    elif how == "empty class":
        pathlib.Path(root, "yellow").mkdir()
    elif how == "empty folder":
        for colour in COLOURS:
            pathlib.Path(root, colour).rename(pathlib.Path(root).parent / f"moved {colour}")
    elif how == "16 bits":
        Image.fromarray(np.full((40, 40), 30_000, "uint16")).save(red / "3.png")
    else:
        (red / "3.png").write_bytes(b"\x89PNG, but no more")


def test_what_is_transparent_is_white_whatever_its_hidden_colour(folder):
    for name, hidden in (("red", 0), ("blue", 255)):
        picture = Image.new("RGBA", (40, 40), (hidden, hidden, hidden, 0))
        picture.save(pathlib.Path(folder, name, "3.png"))
    clear = [name for name, image in labels_and_images(rh.load_data(folder)) if image.min() == 255]
    assert sorted(clear) == ["blue", "red"]


def test_a_name_that_is_not_utf_8(folder):
    """As old archives leave them on Linux."""
    old = os.path.join(os.fsencode(folder), b"red", b"caf\xe9.png")
    try:
        os.rename(os.path.join(folder, "red", "3.png"), old)
    except OSError:
        pytest.skip("this file system allows no such name")
    assert len(rh.load_data(folder).train_images) == 21


@pytest.mark.parametrize("how, words", [
    ("one class", ["at least two subfolders", "my photos", "'red': '10 pictures'"]),
    ("empty class", ["each with pictures", "my photos", "'yellow': '0 pictures'"]),
    ("empty folder", ["at least two subfolders", "my photos"]),
    ("broken picture", ["red/3.png is no picture", "Mend or remove it"]),
    ("16 bits", ["red/3.png", "8 bits per colour. Received: I;16", "Mend or remove it"]),
])
def test_what_is_wrong_with_a_folder_is_told_in_a_sentence(folder, how, words, capsys):
    spoil(folder, how)
    with pytest.raises(ValueError) as error:
        rh.prepare_dataset("quick", folder)
        rh.load_data(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((pathlib.Path(folder).parent / "cache").glob("*.npz"))


def test_a_broken_picture_is_mended(folder):
    spoil(folder, "broken picture")
    with pytest.raises(ValueError, match="is no picture"):
        rh.load_data(folder)
    draw(pathlib.Path(folder, "red", "3.png"), "RGB", np.random.default_rng(0), 0)
    assert len(rh.load_data(folder).train_images) == 21


@pytest.mark.parametrize("name", ["cats_vs_dog", "/nowhere/my_photos", "my_photos"])
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_what_nobody_knows_is_told_in_a_sentence(places, monkeypatch, name, profile):
    def no_download(name):
        raise AssertionError(f"asked for {name}")

    monkeypatch.setattr(rh, "_download", no_download)
    with pytest.raises(ValueError, match="TensorFlow Datasets knows, or the absolute path of a "
                                         f"folder .*Received: '{name}'"):
        rh.prepare_dataset(profile, name)
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        rh.load_data(name)


@pytest.mark.parametrize("missing", ["image", "label", "classes", "train"])
def test_what_a_data_set_lacks_is_told_in_a_sentence(places, missing):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(names=["young", "old"])}
    example = {"image": np.zeros((8, 8, 1), "uint8"), "label": 1}
    if missing == "classes":
        features["label"] = tfds.features.Scalar(np.int64)
    elif missing in example:
        features["another"], example["another"] = features.pop(missing), example.pop(missing)
    store("portraits", features, [example] * 10, "test" if missing == "train" else "train")
    with pytest.raises(ValueError, match="^Needed: .*portraits") as error:
        rh.load_data("portraits")
    assert "\n" not in str(error.value)


def forget_the_data_set(places):
    for path in sorted((places / "tfds").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_decoded_data_set_is_trained_without_cats(gray, places):
    """In a process of its own, as notebooks train: nothing is asked for, nothing is downloaded."""
    for size in (16, "16", 16.5, -1):  # refused before anything is decoded
        with pytest.raises(ValueError, match="image_size"):
            rh.make_config("resnet34", "test", gray, image_size=size)
    assert not list((places / "cache").glob("*.npz"))
    rh.load_data(gray, 16)
    forget_the_data_set(places)
    sizes = {"epochs": 1, "train_images": 8, "val_images": 8, "image_size": 16}
    configs, seen = [rh.make_config("resnet20", "test", gray, **sizes)], []
    assert "image_size_16" in rh.run_path(configs[0]).name
    runs = rh.train_runs(configs, show=seen.append)
    assert set(runs.dataset) == {gray} and set(runs.classes) == {3}
    assert seen and set(seen[-1].dataset) == {gray}
    assert not list((places / "tfds").rglob("*"))
    assert [path.name for path in (places / "cache").glob("*.npz")] == [
        path.name for path in (places / "cache").glob("gray_things-16px-*.npz")]


LOAD = """
import sys, resnet_helpers as rh
print("ready", flush=True)
sys.stdin.readline()
print(rh.load_data(sys.argv[1]).train_images.sum())
"""


def test_two_that_load_at_once_decode_once(folder):
    processes = [subprocess.Popen(
        [sys.executable, "-c", LOAD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=pathlib.Path(rh.__file__).parent) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert sorted(len(lines) for lines in said) == [1, 2]  # one of them says "Decoding"
    assert sum(line.startswith("Decoding") for lines in said for line in lines) == 1
    assert said[0][-1] == said[1][-1] and said[0][-1].isdigit()
