import os
import pathlib
import sys

import pytest

# Workers of pytest share the cores, and runs are compared to the last digit: one thread for all.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import resnet_helpers  # noqa: E402, F401 (before TensorFlow: it sets what that reads)


@pytest.fixture(scope="session")
def tiny_tfds(tmp_path_factory):
    """200 images of several sizes as a prepared cats_vs_dogs: reddish cats, bluish dogs."""
    import numpy as np
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3)), "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"])})
    examples = []
    for i, label in enumerate(rng.integers(0, 2, 200)):
        image = rng.integers(0, 100, (*rng.integers(40, 70, 2), 3), dtype="uint8")
        image[..., 2 * label] += 100
        examples.append((i, {"image": image, "image/filename": f"{i}.jpg", "label": label}))
    where = tmp_path_factory.mktemp("tfds")
    tfds.dataset_builders.store_as_tfds_dataset(
        "cats_vs_dogs", "4.0.1", features, {"train": examples}, data_dir=where)
    return where


@pytest.fixture
def tiny_cats(tiny_tfds, tmp_path, monkeypatch):
    """Make the tiny data set the one that is found; returns the test's folder.

    Its `cache` holds the decoded file.
    """
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds))
    monkeypatch.setenv("RESNET_DATA", str(tmp_path / "cache"))
    return tmp_path
