"""Plain and residual networks on cats_vs_dogs: the one helper behind the four notebooks.

"The paper" is He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
Five parts, in this order: data, models, training, results, plots.
"""

import base64
import contextlib
import datetime
import functools
import gc
import hashlib
import json
import logging
import math
import numbers
import os
import pathlib
import platform
import sys
import time
import typing
import zipfile
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

# Many processors leave TensorFlow's fast convolutions (oneDNN) off; the switch is read when TensorFlow loads.
if "tensorflow" in sys.modules and "TF_ENABLE_ONEDNN_OPTS" not in os.environ:
    print("Note: import resnet_helpers before tensorflow, or training can be several times slower on a CPU.")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no information lines from native code

sys.stderr.flush()
stderr = os.dup(2)
with open(os.devnull, "w") as sink:
    os.dup2(sink.fileno(), 2)  # hold back what native libraries print while they load (an exception still shows)
try:
    import keras

    keras.ops.zeros(())  # the first operation starts the device, which prints too
finally:
    os.dup2(stderr, 2)
    os.close(stderr)
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its advice on retracing does not apply: each net is new

# ------------------------------------------------------------------------------------------------ data

PROFILES = {
    "full": {"train_images": 16_283, "val_images": 6_979, "epochs": 15},
    "quick": {"train_images": 2_048, "val_images": 1_024, "epochs": 3},
    "test": {"train_images": 96, "val_images": 48, "epochs": 2},
}
SPLITS = ["train[:70%]", "train[70%:]"]
DIGITS = "sklearn_digits"
ZIP = "kagglecatsanddogs_5340.zip"  # the name that TFDS looks for
RESULTS = pathlib.Path(os.environ.get("RESNET_RESULTS", pathlib.Path(__file__).resolve().parent / "results"))


def get_profile(name=None):
    """Return the profile's name: `name`, else the environment variable RESNET_PROFILE, else "full"."""
    return _check("profile", name or os.environ.get("RESNET_PROFILE", "full"), PROFILES)


def _check(what, received, allowed):
    """Return `received` if it is one of `allowed`, else raise a ValueError that names both."""
    if received not in allowed:
        raise ValueError(f"Unknown {what}. Received: {received!r}. Allowed: {', '.join(map(str, allowed))}.")
    return received


def data_dir():
    """Folder of the prepared data sets: TFDS_DATA_DIR, else TFDS's own default."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _prepared(name):
    """Path of the newest prepared version's dataset_info.json, or None (without importing TFDS)."""
    return max(data_dir().glob(f"{name}/*/dataset_info.json"), default=None)


def prepare_dataset(profile=None, url=None):
    """Make sure that the data set is on this machine and return its name.

    Uses what is prepared in `data_dir()`, else downloads `cats_vs_dogs` (787 MB) through TFDS, from `url` if given.
    Without a network and for any profile but "full", falls back to scikit-learn's handwritten digits.

    Raises:
        ConnectionError: profile "full", nothing prepared and no network.
        RuntimeError: the download or the preparation broke off.
    """
    profile, name = get_profile(profile), "cats_vs_dogs"
    if os.environ.get("RESNET_DATA") or _prepared(name):
        return name
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cats_vs_dogs

    cats_vs_dogs._URL = url or cats_vs_dogs._URL
    where = data_dir()
    if not any(where.glob(f"downloads/**/*{ZIP}")):  # a zip that the user put there needs no network
        try:
            requests.head(cats_vs_dogs._URL, timeout=10)
        except requests.exceptions.RequestException as error:
            if profile == "full":
                raise ConnectionError(
                    f"cats_vs_dogs is not prepared in {where} and cannot be downloaded ({type(error).__name__}). "
                    "Connect once to download it (787 MB), set TFDS_DATA_DIR to a folder that holds it, put its zip "
                    f"({ZIP}) into {where}/downloads/manual, or choose RESNET_PROFILE=quick, which can use other data."
                ) from None  # the chain of network errors below it says nothing more
            line = "!" * 100
            print(f"{line}\n!! NO CATS, NO DOGS: cats_vs_dogs is not prepared here and there is no network.\n"
                  f"!! This run uses scikit-learn's handwritten digits instead ({DIGITS}, 10 classes).\n{line}")
            return _store_digits(where)
    try:
        tfds.builder(name, data_dir=where).download_and_prepare()
    except Exception as error:
        raise RuntimeError(
            f"Downloading or preparing cats_vs_dogs in {where} broke off: {error}. Nothing complete is lost; run again."
        ) from error
    return name


def _store_digits(where):
    """Store scikit-learn's 1,797 digits (8x8) once as a TFDS data set and return its name."""
    if not _prepared(DIGITS):
        import tensorflow_datasets as tfds
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.repeat((digits.images * 255 / 16).astype("uint8")[..., None], 3, axis=-1)
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        examples = [(i, {"image": images[i], "label": label}) for i, label in enumerate(digits.target)]
        tfds.dataset_builders.store_as_tfds_dataset(
            DIGITS, "1.0.0", tfds.features.FeaturesDict(features), {"train": examples}, data_dir=where
        )
    return DIGITS


class Data(typing.NamedTuple):
    """Both splits as arrays: images uint8 (n, size, size, 3), labels int64 (n,)."""

    class_names: tuple
    train_images: np.ndarray
    train_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray


@functools.lru_cache(maxsize=1)
def load_data(name="cats_vs_dogs", image_size=32):
    """Return both splits (70% and 30%), decoded and resized once a machine and kept in one file.

    The file lies in `RESNET_CACHE` (default ~/.cache/resnet_helpers); `RESNET_DATA` names such a file directly and
    then neither TensorFlow nor TFDS is needed. The data set must be prepared (see `prepare_dataset`).
    """
    given = os.environ.get("RESNET_DATA")
    source = _prepared(name)
    if given and not pathlib.Path(given).exists():
        raise FileNotFoundError(f"RESNET_DATA names no file. Received: {given}.")
    if not given and not source:
        raise FileNotFoundError(f"{name} is not prepared in {data_dir()}; call prepare_dataset() first.")
    cache = pathlib.Path(os.environ.get("RESNET_CACHE", "~/.cache/resnet_helpers")).expanduser()
    key = None if given else hashlib.sha256(source.read_bytes()).hexdigest()[:8]  # other copies differ in it
    path = pathlib.Path(given) if given else cache / f"{name}-{image_size}px-{key}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                data = Data(tuple(map(str, file["class_names"])), *(file[key] for key in Data._fields[1:]))
            return _checked(data, image_size, path)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError) as error:
            if given:
                raise ValueError(f"{path} is not a file that load_data wrote, or it is damaged: {error}") from error
            print(f"{path.name} is damaged ({error}); decoding the images again.")
    print(f"Decoding {name} to {image_size}x{image_size} pixels, once on this machine ...", flush=True)
    data = _checked(_decode(name, image_size), image_size, source.parent)
    _write_whole(path, lambda file: np.savez(file, **data._asdict()))
    return data


def _checked(data, image_size, where):
    counts = len(data.train_labels), len(data.val_labels)
    if min(counts) == 0:
        raise ValueError(f"No images. Received: {counts[0]} for training, {counts[1]} for validation in {where}.")
    if data.train_images.shape[1:] != (image_size, image_size, 3):
        raise ValueError(f"Images of {data.train_images.shape[1:]} in {where}; wanted {(image_size, image_size, 3)}.")
    return data


def _decode(name, image_size):
    """Read, resize and collect both splits in a fixed order."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def resize(example):
        image = tf.image.resize(example["image"], [image_size, image_size], antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8), example["label"]

    options = tf.data.Options()
    options.autotune.enabled = False  # its thread holds up the end of a pass by up to a minute
    read = tfds.ReadConfig(options=options, try_autocache=False)
    arrays = []
    try:
        splits, info = tfds.load(name, split=SPLITS, data_dir=data_dir(), with_info=True, read_config=read,
                                 download=False)
        for split in splits:
            batches = list(split.map(resize, num_parallel_calls=os.cpu_count()).batch(512).as_numpy_iterator())
            empty = (np.zeros((0, image_size, image_size, 3), "uint8"), np.zeros(0, "int64"))
            arrays += [np.concatenate(part) for part in zip(empty, *batches)]
    except tf.errors.OpError as error:
        where = data_dir() / name
        raise ValueError(f"A damaged record in {where}: {error.message}. Remove it and prepare it again.") from error
    return Data(tuple(info.features["label"].names), *arrays)


def normalize(images):
    """uint8 (0 to 255) to float32 (0 to 1), any shape."""
    return images.astype("float32") / 255


def augment(images, rng):
    """Flip each image with probability 1/2 and shift it by up to 4 pixels (paper, section 4.2); shape and type stay."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (flip, dy, dx) in enumerate(zip(rng.random(len(images)) < 0.5, *rng.integers(0, 9, (2, len(images))))):
        image = padded[i, dy : dy + size, dx : dx + size]
        out[i] = image[:, ::-1] if flip else image
    return out


class Batches(keras.utils.PyDataset):
    """Input pipeline: batches of float32 images in 0 to 1, (batch, size, size, 3), and int labels, (batch,).

    Each pass yields every image exactly once (the last batch may be smaller). With `training=True` the order and
    the augmentation depend on (seed, epoch) and nothing else, so that a run can stop and go on exactly.
    """

    def __init__(self, images, labels, batch_size=64, training=False, seed=0):
        # With two workers Keras prefetches by itself and leaves tf.data's autotuning off, whose thread would hold up
        # the end of every epoch.
        super().__init__(workers=2)
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(f"Need as many labels as images, and some. Received: {len(images)} and {len(labels)}.")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.training, self.seed = training, seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.epoch, count = epoch, len(self.images)
        self.order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.training else np.arange(count)

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.images[rows]
        if self.training:
            images = augment(images, np.random.default_rng([self.seed, self.epoch, index]))
        return normalize(images), self.labels[rows]


# ---------------------------------------------------------------------------------------------- models

SHORTCUTS = ("zero_pad", "projection", "projection_all")  # options A, B and C of the paper's section 4.1
# Units in conv2_x, conv3_x, conv4_x and conv5_x, and whether they are bottlenecks (paper, Table 1).
DEPTHS = {18: ([2, 2, 2, 2], False), 34: ([3, 4, 6, 3], False), 50: ([3, 4, 6, 3], True),
          101: ([3, 4, 23, 3], True), 152: ([3, 8, 36, 3], True)}
MODELS = {f"{kind}{depth}": depth for depth in DEPTHS for kind in ("plain", "resnet")}


@keras.saving.register_keras_serializable("resnet_helpers")
class Conv2D(keras.layers.Conv2D):
    """A convolution that pads alike on all sides, as the paper's nets do (Keras's "same" does so only at stride 1).

    It has no bias. Where the output is one pixel, it leaves out the taps that can only see padding: one small matrix
    product, the same numbers and gradients in a third of the time.
    """

    def call(self, inputs):
        (height, width), kernel, stride = inputs.shape[1:3], self.kernel, self.strides[0]
        pad = self.kernel_size[0] // 2
        if max(height, width) <= stride:
            seen = inputs[:, : pad + 1, : pad + 1]
            taps = kernel[pad : pad + seen.shape[1], pad : pad + seen.shape[2]]
            matrix = keras.ops.reshape(taps, (math.prod(seen.shape[1:]), self.filters))
            product = keras.ops.matmul(keras.ops.reshape(seen, (-1, matrix.shape[0])), matrix)
            return keras.ops.reshape(product, (-1, 1, 1, self.filters))
        if stride == 1:
            return super().call(inputs)
        if pad:
            inputs = keras.ops.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        return keras.ops.conv(inputs, kernel, strides=stride, padding="valid", data_format="channels_last")


def conv_bn(x, filters, kernel_size, stride, name, seed=None):
    """Convolution without bias (the batch norm after it has one), He initialisation, batch norm."""
    if seed is not None:  # by name, so that twins start from the same weights in the layers that they share
        seed = zlib.crc32(f"{seed} {name}".encode())
    x = Conv2D(filters, kernel_size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv",
               kernel_initializer=keras.initializers.HeNormal(seed))(x)
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, synchronized=_replicas() > 1,
                                           name=f"{name}_bn")(x)


def build_unit(x, kernel_sizes, channel_sizes, stride, name, *, is_plain=False, shortcut="projection",
               stride_in="1x1", seed=None):
    """One unit: y = relu(F(x) + x), or with a projection y = relu(F(x) + W_s x) (paper, equations 1 and 2).

    `is_plain` leaves the shortcut out: y = relu(F(x)). See `build_resnet_block` for the arguments.
    """
    strided = 0 if stride_in == "1x1" else next((i for i, k in enumerate(kernel_sizes) if k > 1), 0)
    branch = x  # becomes F(x), the residual branch
    for i, (kernel_size, filters) in enumerate(zip(kernel_sizes, channel_sizes)):
        if i > 0:
            branch = keras.layers.Activation("relu", name=f"{name}_{i}_relu")(branch)
        branch = conv_bn(branch, filters, kernel_size, stride if i == strided else 1, f"{name}_{i + 1}", seed)
    y = branch
    if not is_plain:
        filters = channel_sizes[-1]
        if shortcut == "projection_all" or (shortcut == "projection" and branch.shape != x.shape):
            x = conv_bn(x, filters, 1, stride, f"{name}_0", seed)  # W_s x
        elif filters < x.shape[-1]:
            raise ValueError(f"Fewer channels need a projection. Received: {x.shape[-1]} to {filters}.")
        elif branch.shape != x.shape:
            x = keras.ops.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))
        y = keras.layers.Add(name=f"{name}_add")([x, branch])  # F(x) + x
    return keras.layers.Activation("relu", name=f"{name}_out")(y)


def build_resnet_block(input_layer, block_num, num_units, kernel_sizes, channel_sizes, *, is_plain=False,
                       stride=None, shortcut="projection", stride_in="1x1", seed=None):
    """Build one stage of the paper's Table 1 (conv2_x is `block_num` 2, ..., conv5_x is 5).

    Args:
        input_layer: Keras tensor of shape (batch, height, width, channels).
        block_num: Number of the stage, which names its layers.
        num_units: Units in the stage.
        kernel_sizes, channel_sizes: One entry for each convolution of a unit, such as (3, 3) and (64, 64), or
            (1, 3, 1) and (64, 64, 256) for a bottleneck.
        is_plain: Leave out the shortcuts and change nothing else.
        stride: Of the first unit; by default 1 in conv2_x (the pool before it has halved the image), 2 after it.
        shortcut: Where the shape changes: "zero_pad" (the paper's option A, no parameters) or "projection" (B);
            "projection_all" projects in every unit (C).
        stride_in: The convolution of a bottleneck that strides; the paper leaves it open: the first "1x1" (the
            authors' released nets) or the "3x3" ("v1.5").
        seed: Makes the initial weights reproducible, layer by layer.

    Returns:
        Keras tensor of shape (batch, ceil(height / stride), ceil(width / stride), channel_sizes[-1]).
    """
    if len(kernel_sizes) != len(channel_sizes) or not kernel_sizes:
        raise ValueError(f"kernel_sizes and channel_sizes need one entry for each convolution of a unit. "
                         f"Received: {list(kernel_sizes)} and {list(channel_sizes)}.")
    if num_units < 1:
        raise ValueError(f"A stage needs at least 1 unit. Received: num_units={num_units}.")
    _check("shortcut", shortcut, SHORTCUTS)
    _check("stride_in", stride_in, ("1x1", "3x3"))
    stride = stride or (1 if block_num == 2 else 2)
    x = input_layer
    for unit in range(1, num_units + 1):
        x = build_unit(x, kernel_sizes, channel_sizes, stride if unit == 1 else 1, f"conv{block_num}_block{unit}",
                       is_plain=is_plain, shortcut=shortcut, stride_in=stride_in, seed=seed)
    return x


def build_resnet(input_shape, units_per_block, channels, num_classes, *, bottleneck=False, is_plain=False,
                 stem="imagenet", seed=None, name=None, **options):
    """Build a whole net of the paper's Table 1; it ends in logits, (batch, num_classes), not in probabilities.

    Args:
        input_shape: (height, width, channels), at least 32 pixels each way (8 with the "cifar" stem).
        units_per_block: Units of each stage, such as [3, 4, 6, 3].
        channels: Channels of each stage's 3x3 convolutions, such as [64, 128, 256, 512].
        num_classes: At least 2.
        bottleneck: Units of 1x1, 3x3 and 1x1 (four times the channels) instead of two 3x3 (paper, Figure 5).
        is_plain: Leave out the shortcuts and change nothing else.
        stem: "imagenet" (7x7 stride 2 and max pool, Table 1) or "cifar" (3x3 stride 1, no pool, section 4.2).
        seed, options: See `build_resnet_block`.
    """
    _check("stem", stem, ("imagenet", "cifar"))
    least = 32 if stem == "imagenet" else 8
    if len(units_per_block) != len(channels) or not channels:
        raise ValueError(f"units_per_block and channels need one entry for each stage. "
                         f"Received: {list(units_per_block)} and {list(channels)}.")
    if len(input_shape) != 3 or not all(isinstance(n, numbers.Integral) and n > 0 for n in input_shape) \
            or min(input_shape[:2]) < least:
        raise ValueError(f"input_shape must be (height, width, channels) with at least {least} pixels each way, so "
                         f"that the net can halve the image. Received: {tuple(input_shape)}.")
    if not isinstance(num_classes, numbers.Integral) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2. Received: {num_classes!r}.")
    image = x = keras.Input(input_shape, name="image")
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    x = keras.layers.Activation("relu", name="conv1_relu")(conv_bn(x, channels[0], kernel, stride, "conv1", seed))
    if stem == "imagenet":
        x = keras.layers.ZeroPadding2D(1, name="pool1_pad")(x)  # zeros are harmless after a ReLU
        x = keras.layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for block_num, (num_units, width) in enumerate(zip(units_per_block, channels), start=2):
        kernel_sizes, channel_sizes = ((1, 3, 1), (width, width, 4 * width)) if bottleneck else ((3, 3), (width, width))
        x = build_resnet_block(x, block_num, num_units, kernel_sizes, channel_sizes, is_plain=is_plain, seed=seed,
                               **options)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    start = keras.initializers.HeNormal(seed)
    logits = keras.layers.Dense(num_classes, kernel_initializer=start, name="predictions")(x)
    return keras.Model(image, logits, name=name)


def create_model(name, input_shape=(32, 32, 3), num_classes=2, **options):
    """Build a named net: "resnet" or "plain" and 18, 34, 50, 101 or 152 (paper, Table 1); see `build_resnet`."""
    units, bottleneck = DEPTHS[MODELS[_check("model", name, MODELS)]]
    return build_resnet(input_shape, units, [64, 128, 256, 512], num_classes, bottleneck=bottleneck,
                        is_plain=name.startswith("plain"), name=name, **options)


def title(name):
    """ "resnet34" to "ResNet-34", "plain34" to "plain-34"."""
    return name.replace("resnet", "ResNet-").replace("plain", "plain-")


def stage_table(model):
    """Count a built net stage by stage, as the paper's Table 1 does; nothing in it is typed.

    Columns: output size, layers (kernel sizes and channels of the unit that repeats), units, weight layers (the
    paper's depth: without projections), trainable parameters, and multiply-adds of one image (those of convolutions
    and the classifier, projections included).
    """
    rows = {}
    for layer in model.layers:
        first = layer.name.split("_")[0]
        part = {"pool1": "conv2", "avg": "classifier", "predictions": "classifier"}.get(first, first)
        if part != "classifier" and not part.startswith("conv"):
            continue  # the input, and the layers without weights and names that a zero-padded shortcut adds
        part += "_x" if part[-1] in "2345" else ""
        row = rows.setdefault(part, {"output": "", "layers": [], "units": 0, "weight layers": 0, "parameters": 0,
                                     "multiply-adds": 0})
        row["output"] = "x".join(str(n) for n in layer.output.shape[1:])
        row["units"] += layer.name.endswith("_out")
        row["parameters"] += sum(math.prod(weight.shape) for weight in layer.trainable_weights)
        if hasattr(layer, "kernel"):
            row["multiply-adds"] += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
            if not layer.name.endswith("_0_conv"):
                row["weight layers"] += 1
                is_conv = isinstance(layer, Conv2D)
                row["layers"].append("{0}x{0}, {1}".format(layer.kernel_size[0], layer.filters) if is_conv else
                                     f"fc, {layer.units}")
    table = pd.DataFrame.from_dict(rows, orient="index")
    repeats = table["units"].clip(lower=1)
    table["layers"] = ["; ".join(layers[: len(layers) // n]) for layers, n in zip(table["layers"], repeats)]
    table.loc["total"] = ["", "", *table.iloc[:, 2:].sum()]
    return table


def unit_signals(model, images, labels):
    """What goes through a net in one training step: a DataFrame with one row a unit (needs TensorFlow).

    Columns: signal (root mean square of the unit's output) and gradient (Euclidean norm of the loss's gradient with
    respect to the kernels of the unit's residual branch). `images` float32 (n, height, width, 3), `labels` (n,). The
    net is left as it was.
    """
    import tensorflow as tf

    units = [layer for layer in model.layers if layer.name.endswith("_out")]
    kernels = [[layer.kernel.value for layer in model.layers if layer.name.startswith(unit.name[:-3])
                and layer.name.endswith("_conv") and "_0_" not in layer.name] for unit in units]
    averages = [keras.ops.copy(variable) for variable in model.non_trainable_variables]
    probe = keras.Model(model.input, [*(unit.output for unit in units), model.output])
    with tf.GradientTape() as tape:
        *outputs, logits = probe(images, training=True)
        loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))
    gradients = tape.gradient(loss, kernels)
    for variable, value in zip(model.non_trainable_variables, averages):
        variable.assign(value)  # the pass above moved the batch norms' averages
    rms = [float(keras.ops.sqrt(keras.ops.mean(output**2))) for output in outputs]
    norms = [float(tf.linalg.global_norm(part)) for part in gradients]
    return pd.DataFrame({"signal": rms, "gradient": norms}, index=[unit.name[:-4] for unit in units])


# -------------------------------------------------------------------------------------------- training

NETWORK = ("model", "shortcut")  # what an ablation may vary; seeds repeat it, everything else must be equal
COMPARABLE = ("backend", "device", "images_crc32")  # of the environment: must be equal too
RATE = 1e-3  # the learning rate of all runs but those that check it


def make_config(model, profile=None, dataset="cats_vs_dogs", seed=0, **changes):
    """Return the configuration of one run as a dict; `changes` override single entries.

    Entries that only say what is always done (schedule, augmentation) cannot be changed.

    Raises:
        ValueError: an unknown model, profile, shortcut or entry.
    """
    profile = get_profile(profile)
    config = {
        "model": _check("model", model, MODELS), "dataset": dataset, "image_size": 32, "batch_size": 64,
        **PROFILES[profile], "optimizer": "adam", "learning_rate": RATE, "schedule": "half an epoch up, cosine down",
        "augmentation": "flips, 4-pixel shifts", "stem": "imagenet", "stride_in": "1x1",
        "shortcut": "none" if model.startswith("plain") else "projection", "seed": seed, "profile": profile,
    }
    free = [key for key in config if key not in ("model", "dataset", "schedule", "augmentation", "profile")]
    for key, value in changes.items():
        config[_check("entry of a configuration", key, free)] = value
    _check("shortcut", config["shortcut"], ("none",) if model.startswith("plain") else SHORTCUTS)
    if dataset == DIGITS:
        config["train_images"], config["val_images"] = (
            min(config[key], count) for key, count in (("train_images", 1_258), ("val_images", 539)))
    return config


def variant(config):
    """What sets a run apart from the grid: "", or such as "-zero_pad" or "-rate0.003"; a part of its file's name."""
    shortcut = "" if config["shortcut"] in ("none", "projection") else f"-{config['shortcut']}"
    return shortcut + ("" if config["learning_rate"] == RATE else f"-rate{config['learning_rate']:g}")


def run_path(config, folder=None):
    """Where a run's file lies: results/<profile>/<dataset>/<model>[-<shortcut>][-rate<rate>]-seed<seed>.json."""
    folder = pathlib.Path(folder or RESULTS / config["profile"] / config["dataset"])
    return folder / f"{config['model']}{variant(config)}-seed{config['seed']}.json"


@keras.saving.register_keras_serializable("resnet_helpers")
class Adam(keras.optimizers.Adam):
    """Adam (Kingma and Ba 2015); with TensorFlow one pass over the weights, where Keras's own formula makes ten."""

    def _backend_update_step(self, gradients, variables, learning_rate):
        if keras.backend.backend() != "tensorflow" or _replicas() > 1:
            return super()._backend_update_step(gradients, variables, learning_rate)
        for gradient, variable in zip(gradients, variables):  # by Keras's own way the net would never be freed
            self.update_step(gradient, variable.value, learning_rate)

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow":
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index, step = self._get_variable_index(variable), keras.ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step, beta2_power=self.beta_2**step, beta1=self.beta_1, beta2=self.beta_2,
            lr=keras.ops.cast(learning_rate, variable.dtype), epsilon=self.epsilon, grad=gradient)


OPTIMIZERS = {"adam": Adam, "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9)}


def learning_rate(config):
    """The schedule: linearly up to config["learning_rate"] for half an epoch, then down to 0 along a cosine."""
    epoch = math.ceil(config["train_images"] / config["batch_size"])
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, config["epochs"] * epoch - epoch // 2), warmup_target=config["learning_rate"],
        warmup_steps=max(1, epoch // 2))


def build_from_config(config, num_classes):
    """The compiled net of a configuration."""
    _check("optimizer", config["optimizer"], OPTIMIZERS)
    options = {key: config[key] for key in ("stem", "stride_in", "shortcut", "seed") if config[key] != "none"}
    model = create_model(config["model"], (config["image_size"], config["image_size"], 3), num_classes, **options)
    model.compile(
        OPTIMIZERS[config["optimizer"]](learning_rate(config)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"],
        # XLA is four times slower than oneDNN on a CPU; on other devices Keras decides.
        jit_compile=False if keras.backend.backend() == "tensorflow" and _device().startswith("CPU") else "auto")
    return model


def train_run(config, folder=None, retrain=False, on_epoch=None):
    """Train one net, or load it if its file is there, and return the run: config, history, environment.

    Every finished epoch is saved: a run that was cut off goes on from there and ends in the same history.
    `on_epoch` is called with the run so far after each epoch.

    Raises:
        ValueError: a file of this name holds a run of another configuration, or too few images.
        PermissionError: the results folder cannot be written.
    """
    path = run_path(config, folder)
    if path.exists() and not retrain:
        run = read_run(path)
        differ = [f"{key}: {run['config'].get(key)!r}, wanted {config[key]!r}" for key in config
                  if run["config"].get(key) != config[key]]
        if differ:
            raise ValueError(f"{path} holds another run ({'; '.join(differ)}). Choose another folder, or retrain=True.")
        print(f"{title(config['model'])}, seed {config['seed']}: loaded {path.name}, not trained again", flush=True)
        _tidy(path)
        return run
    _write_whole(path.with_suffix(".tmp"), lambda file: file.write(b""))  # find out now, not after hours
    path.with_suffix(".tmp").unlink()
    if config["dataset"] != DIGITS:
        prepare_dataset("full")
    data = load_data(config["dataset"], config["image_size"])
    parts = {}
    for split in ("train", "val"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        count = config[f"{split}_images"]
        if not 0 < count <= len(images):
            raise ValueError(f"{split}_images must be from 1 to {len(images)} (all there are). Received: {count}.")
        parts[split] = Batches(images[:count], labels[:count], config["batch_size"], split == "train", config["seed"])
    gc.collect()  # nets hold themselves in circles; free the one before now, not at Python's leisure
    with _training_scope(config):
        model = build_from_config(config, len(data.class_names))
        model.optimizer.build(model.trainable_variables)
    run = {"config": config, "status": "finished", "history": {key: [] for key in HISTORY},
           "environment": environment(data)}
    recorder = _Recorder(run, path, parts["train"], on_epoch)
    recorder.set_model(model)
    epochs = recorder.restore()
    if run["status"] == "finished":
        model.fit(parts["train"], validation_data=parts["val"], initial_epoch=epochs, epochs=config["epochs"],
                  shuffle=False, verbose=0, callbacks=[recorder])
    if run["status"] == "finished":
        classes = model.predict(parts["val"], verbose=0).argmax(-1).astype("uint8")
        run["val_predictions"] = base64.b64encode(zlib.compress(classes.tobytes())).decode()
        if keras.backend.backend() == "tensorflow":
            batch = normalize(data.train_images[: config["batch_size"]]), data.train_labels[: config["batch_size"]]
            run["unit_signals"] = unit_signals(model, *batch).round(6).to_dict("list")
    _write_run(path, run)
    _tidy(path)
    return run


def _tidy(path):
    """Remove what training leaves beside a finished run's file, also what was left by a kill while saving."""
    for left in (path.with_suffix(".ckpt"), path.with_suffix(".tmp"), *path.parent.glob(f".{path.stem}.*")):
        left.unlink(missing_ok=True)


def train_runs(configs, folder=None, retrain=False):
    """Train or load runs one after the other, with a live figure in Jupyter; returns them as `read_runs` does."""
    runs, live = [], _Live()
    for number, config in enumerate(configs, 1):
        print(f"[{number}/{len(configs)}] {title(config['model'])}, seed {config['seed']}", flush=True)
        runs.append(train_run(config, folder, retrain, lambda run: live.show(plot_histories, _frame([*runs, run]))))
    live.show(plot_histories, _frame(runs))
    return _frame(runs)


class _Recorder(keras.callbacks.Callback):
    """Keeps the history, saves a checkpoint after each epoch, and says how far the run is."""

    def __init__(self, run, path, train, on_epoch):
        super().__init__()
        self.run, self.history, self.train, self.on_epoch = run, run["history"], train, on_epoch
        self.checkpoint, self.live, self.said = path.with_suffix(".ckpt"), _Live(), 0.0

    def restore(self):
        """Return the number of finished epochs, after putting the net and the history back to where they were."""
        if not self.checkpoint.exists():
            return 0
        try:
            with np.load(self.checkpoint, allow_pickle=False) as file:
                saved = json.loads(str(file["run"]))
                values = [file[str(i)] for i in range(len(file.files) - 1)]
            if saved["config"] != self.run["config"]:
                raise ValueError("it belongs to another configuration")
            differ = [key for key in COMPARABLE if saved["environment"][key] != self.run["environment"][key]]
            if differ:
                raise ValueError(f"it was made with another {' and '.join(differ)}")
            if [value.shape for value in values] != [tuple(variable.shape) for variable in self._state()]:
                raise ValueError("it belongs to another net")
            for variable, value in zip(self._state(), values):
                variable.assign(value)
        except Exception as error:
            aside = self.checkpoint.with_suffix(".damaged")
            os.replace(self.checkpoint, aside)
            print(f"The checkpoint cannot be used ({error}); set aside as {aside.name}, starting afresh.")
            return 0
        self.run["status"] = saved["status"]
        self.history.update(saved["history"])
        epochs = len(self.history["loss"])
        print(f"going on after epoch {epochs} of {self.run['config']['epochs']}", flush=True)
        return epochs

    def _state(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_epoch_begin(self, epoch, logs=None):
        self.train.set_epoch(epoch)
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        if now - self.said > 2:
            self.said, done = now, min((batch + 1) * self.train.batch_size, len(self.train.images))
            self.live.say(f"epoch {self.train.epoch + 1}: {done:,} of {len(self.train.images):,} images, "
                          f"{done / (now - self.start):.0f} images/s")

    def on_epoch_end(self, epoch, logs=None):
        config, seconds = self.run["config"], time.perf_counter() - self.start
        for key, values in self.history.items():
            values.append(round(seconds, 3) if key == "seconds" else float(logs[key]))
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            self.run["status"], self.model.stop_training = "diverged", True
            print(f"DIVERGED in epoch {epoch + 1}: loss {logs['loss']}, validation loss {logs['val_loss']}", flush=True)
        left = (config["epochs"] - epoch - 1) * float(np.median(self.history["seconds"]))
        self.live.say("")
        print(f"epoch {epoch + 1}/{config['epochs']}: loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.3f}, "
              f"val_loss {logs['val_loss']:.3f}, val_accuracy {logs['val_accuracy']:.3f}, {seconds:.0f} s, "
              f"{left / 60:.1f} min left for this net", flush=True)
        state = {str(i): keras.ops.convert_to_numpy(variable) for i, variable in enumerate(self._state())}
        _write_whole(self.checkpoint, lambda file: np.savez(file, run=json.dumps(self.run), **state))
        if self.on_epoch:
            self.on_epoch(self.run)


class _Live:
    """One place in a notebook's output (or one line of a terminal) that is overwritten as work goes on."""

    def __init__(self):
        self.handle = None
        self.jupyter = "ipykernel" in sys.modules

    def show(self, draw, *args):
        """Replace the output by the figure that `draw(*args)` returns."""
        if self.jupyter:
            figure = draw(*args)
            self._replace(figure, raw=False)
            plt.close(figure)

    def say(self, text):
        """Replace the output by a line of text."""
        if self.jupyter:
            self._replace({"text/plain": text}, raw=True)
        elif sys.stdout.isatty():
            print(f"\r{text:<78}", end="" if text else "\r", flush=True)

    def _replace(self, content, raw):
        from IPython.display import display

        if self.handle:
            self.handle.update(content, raw=raw)
        else:
            self.handle = display(content, raw=raw, display_id=True)


def _training_scope(config, kind="GPU"):
    """Scope to build a net in: the GPUs of this machine where TensorFlow sees several, else nothing special.

    Takes as many as get equal parts of a batch, and at least one image each of the smaller last ones of both splits.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        devices, size = tf.config.list_logical_devices(kind), config["batch_size"]
        batches = [n for key in ("train_images", "val_images") for n in (min(config[key], size), config[key] % size)]
        while len(devices) > 1:
            parts = [math.ceil(n / len(devices)) for n in batches]  # TensorFlow deals out so many at a time
            if size % len(devices) == 0 and all(n > part * (len(devices) - 1) for n, part in zip(batches, parts) if n):
                return tf.distribute.MirroredStrategy([device.name for device in devices]).scope()
            devices.pop()
    return contextlib.nullcontext()


def _replicas():
    """Devices that share each batch in the current scope."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


@functools.lru_cache
def _device():
    """Name of the device that trains, such as "CPU x86_64" or a GPU's name."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
                 for gpu in tf.config.list_physical_devices("GPU")]
    elif backend == "jax":
        import jax

        names = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    else:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}" if len(names) > 1 else names[0] if names else f"CPU {platform.machine()}"


def environment(data):
    """Versions, device, threads and the checksum of the images, as saved with a run."""
    backend = keras.backend.backend()
    return {"python": platform.python_version(), "keras": keras.__version__, "backend": backend,
            backend: sys.modules[backend].__version__, "numpy": np.__version__, "device": _device(),
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "images_crc32": zlib.crc32(data.val_images, zlib.crc32(data.train_images)),
            "date": datetime.date.today().isoformat()}


# --------------------------------------------------------------------------------------------- results

HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")


def _write_whole(path, write):
    """Call `write(file)` so that `path` ends up whole or untouched, whatever happens meanwhile."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(f"Cannot write {path} ({error.strerror or error}); nothing saved before is lost.") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, it may not even be looked for
            partial.unlink()


def _checksum(run):
    return zlib.crc32(json.dumps({**run, "crc32": 0}, sort_keys=True).encode())


def _write_run(path, run):
    """Save a run with a checksum; numbers that are not finite become null, which JSON can hold."""
    history = {key: [v if math.isfinite(v) else None for v in values] for key, values in run["history"].items()}
    run = {**run, "history": history}
    text = json.dumps({**run, "crc32": _checksum(run)}, indent=1) + "\n"
    _write_whole(path, lambda file: file.write(text.encode()))


def results_folder(profile=None):
    """Folder of a profile's runs: those on cats_vs_dogs if there are any, else those on the digits."""
    folders = [RESULTS / get_profile(profile) / name for name in ("cats_vs_dogs", DIGITS)]
    return next((folder for folder in folders if any(folder.glob("*.json"))), folders[0])


def read_run(path):
    """Read one run's file.

    Raises:
        ValueError: not a whole file written by `train_run`; the message names the file and what is wrong.
    """
    try:
        run = json.loads(pathlib.Path(path).read_text())
        if run["crc32"] != _checksum(run):
            raise ValueError("its checksum does not fit its content")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not a run's file ({error!r}). Move it away or retrain it.") from error
    return run


def read_predictions(path):
    """Read the class that a finished run gave each validation image: uint8 (val_images,)."""
    return np.frombuffer(zlib.decompress(base64.b64decode(read_run(path)["val_predictions"])), "uint8")


def read_runs(folder):
    """Read all runs in a folder: a DataFrame with one row an epoch, its history beside the run's configuration."""
    paths = sorted(pathlib.Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"No runs in {folder}. Train them first (notebook 03).")
    return _frame([read_run(path) for path in paths], [path.name for path in paths])


def _frame(runs, files=None):
    frames = []
    for run, file in zip(runs, files or [run_path(run["config"]).name for run in runs]):
        frame = pd.DataFrame(run["history"], dtype=float)
        frame.insert(0, "epoch", range(1, len(frame) + 1))
        extra = {key: run["environment"].get(key) for key in COMPARABLE}
        extra |= {"file": file, "status": run["status"], "variant": variant(run["config"])}
        frames.append(frame.assign(**run["config"], **extra))
    return pd.concat(frames, ignore_index=True)


def check_comparable(runs):
    """Raise a ValueError that names the files if runs differ in anything but the network and the seed."""
    per_run = runs.drop_duplicates("file").set_index("file")
    for key in per_run.columns.difference([*NETWORK, *HISTORY, "seed", "epoch", "status", "variant"]):
        values = per_run[key]
        if values.nunique(dropna=False) > 1:
            groups = "; ".join(f"{value!r}: {', '.join(f)}" for value, f in values.groupby(values).groups.items())
            raise ValueError(f"These runs cannot be compared: they differ in {key} ({groups}).")
    seeds = per_run.groupby(list(NETWORK)).seed.agg(lambda s: tuple(sorted(map(int, s))))
    if seeds.nunique() > 1:
        listing = "; ".join(f"{model} {shortcut}: {found}" for (model, shortcut), found in seeds.items())
        raise ValueError(f"These runs cannot be compared: not the same seeds for every net ({listing}).")


def complete_seeds(runs):
    """Keep the seeds that every net in `runs` has, and say which runs that leaves out."""
    per_run = runs.drop_duplicates("file")
    nets = per_run.groupby("seed").size()
    complete = nets[nets == per_run.drop_duplicates(list(NETWORK)).shape[0]].index
    left_out = per_run[~per_run.seed.isin(complete)].file
    if len(left_out):
        print("Not every net has these seeds yet, so they are left out:", ", ".join(left_out))
    return runs[runs.seed.isin(complete)]


EPOCHS = {"last": lambda values: values.iloc[-1], "best": "max", "mean of last 3": lambda values: values.tail(3).mean()}


def ablation_table(runs, metric="val_accuracy", epoch="last"):
    """Plain against residual at equal epochs: one row a depth (and shortcut), `metric` as means over seeds.

    `epoch` is "last" (the result), "best" (picked on the validation images, so too good) or "mean of last 3".
    Columns: plain, residual, difference, seeds, and with several seeds the standard deviations and the half width of
    the 95% confidence interval of the difference paired by seed. A net with a run that diverged has no number (NaN).

    Raises:
        ValueError: runs that differ in anything but the network (see `check_comparable`), or an arm is missing.
    """
    check_comparable(runs)
    pick = EPOCHS[_check("epoch", epoch, EPOCHS)]
    runs = runs.assign(**{metric: runs[metric].where(runs.status != "diverged")})
    scores = runs.groupby([*NETWORK, "seed"])[metric].agg(pick)
    rows = {}
    for model, shortcut in sorted(set(scores.index.droplevel("seed")), key=lambda net: (MODELS[net[0]], net[1])):
        plain = f"plain{MODELS[model]}"
        if model == plain:
            continue
        if (plain, "none") not in scores:
            received = ", ".join(sorted(runs.file.unique()))
            raise ValueError(f"No run of {plain} to compare {model} with. Received: {received}.")
        parts = {"plain": scores[plain, "none"], "residual": scores[model, shortcut]}
        parts["difference"] = parts["residual"] - parts["plain"]
        row = {name: part.mean(skipna=False) for name, part in parts.items()} | {"seeds": len(parts["plain"])}
        if row["seeds"] > 1:
            import scipy.stats

            row |= {f"{name} sd": part.std(skipna=False) for name, part in parts.items()}
            row["95% half width"] = scipy.stats.t.ppf(0.975, row["seeds"] - 1) * parts["difference"].sem(skipna=False)
        rows[f"{MODELS[model]} layers" + ("" if shortcut == "projection" else f" ({shortcut})")] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def percent_table(table):
    """The ablation table as text in percent: "71.4", over seeds "71.4 ± 0.6", differences "+9.1 [+7.7, +10.5]"."""
    def cell(row, column):
        value, spread = 100 * row[column], 100 * row.get(f"{column} sd", math.nan)
        if math.isnan(value):
            return "diverged"
        if column != "difference":
            return f"{value:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")
        half = 100 * row.get("95% half width", math.nan)
        return f"{value:+.1f}" + ("" if math.isnan(half) else f" [{value - half:+.1f}, {value + half:+.1f}]")

    columns = ("plain", "residual", "difference")
    return pd.DataFrame({c: [cell(row, c) for _, row in table.iterrows()] for c in columns}, index=table.index)


def to_markdown(table):
    """A DataFrame as a Markdown table (text, index first)."""
    rows = [["", *table.columns], ["---"] * (len(table.columns) + 1), *([i, *row] for i, *row in table.itertuples())]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


# ----------------------------------------------------------------------------------------------- plots

# One colour a net, everywhere (the Okabe-Ito palette, told apart by colour-blind readers too).
COLOURS = {"plain18": "#CC79A7", "resnet18": "#56B4E9", "plain34": "#E69F00", "resnet34": "#0072B2",
           "plain50": "#D55E00", "resnet50": "#009E73", "plain101": "#B39B00",
           "resnet101": "#7A3E9D", "plain152": "#999999", "resnet152": "#000000"}
plt.rcParams.update({"figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 11, "figure.dpi": 90,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"})


def plot_images(images, labels, class_names, heading, columns=8):
    """Draw a grid of images (uint8, or float32 in 0 to 1; sizes may differ) with their class names."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(8, 1.2 * rows + 0.4), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label in zip(axes.flat, images, labels):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(class_names[label], fontsize=10, loc="center")
    figure.suptitle(heading, fontsize=12)
    return figure


def plot_histories(runs, heading="", metrics=("loss", "accuracy")):
    """Draw runs against epochs, a row a metric, a column a depth: training solid, validation dashed, a colour a net."""
    depths = sorted(set(runs.model.map(MODELS)))
    figure, axes = plt.subplots(len(metrics), len(depths), figsize=(8, 2.4 * len(metrics) + 0.8), sharex=True,
                                sharey="row", layout="constrained", squeeze=False)
    for model, group in runs.groupby("model"):
        for axis, metric in zip(axes[:, depths.index(MODELS[model])], metrics):
            for column, style in ((metric, "-"), (f"val_{metric}", "--")):
                curves, colour = group.pivot_table(index="epoch", columns="file", values=column), COLOURS[model]
                axis.plot(curves.mean(axis=1), style, color=colour, linewidth=2, marker="o" if len(curves) == 1 else "",
                          label=title(model) if style == "-" else None)
                if curves.shape[1] > 1:
                    axis.plot(curves, style, color=colour, linewidth=0.6)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    for axis, metric in zip(axes[:, 0], metrics):
        axis.set_ylabel(metric)
    for axis in axes[0]:
        axis.legend(fontsize=10, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handlelength=1.2,
                    columnspacing=1)
    figure.supxlabel("epoch (solid: training, dashed: validation)", fontsize=11)
    if heading:
        figure.suptitle(heading, fontsize=12)
    return figure


def plot_depths(runs, metrics=("accuracy", "val_accuracy"), heading=""):
    """Draw the last epoch against depth, a panel a metric: a point a run, a line through the means of each kind."""
    last = runs[runs.epoch == runs.epochs]
    last = last.assign(depth=last.model.map(MODELS), kind=last.model.str.rstrip("0123456789"))
    depths = sorted(last.depth.unique())
    figure, axes = plt.subplots(1, len(metrics), figsize=(8, 3.8), sharey=True, layout="constrained", squeeze=False)
    for axis, metric in zip(axes.flat, metrics):
        for kind, group in last.groupby("kind"):
            means = 100 * group.groupby("depth")[metric].mean()
            axis.plot(means.index, means, color="#666666", zorder=1)
            axis.scatter(group.depth, 100 * group[metric], color=group.model.map(COLOURS), s=45, zorder=2,
                         marker="s" if kind == "plain" else "o")
            axis.annotate("plain" if kind == "plain" else "residual", (means.index[-1], means.iloc[-1]), (8, 0),
                          textcoords="offset points", va="center")
        axis.set_xticks(depths, [f"{depth}\nbottlenecks" if DEPTHS[depth][1] else f"{depth}" for depth in depths])
        axis.set_xlabel("layers")
        axis.set_title(("validation" if metric.startswith("val_") else "training") + " accuracy, %", fontsize=11)
        axis.margins(x=0.22)
        axis.grid(alpha=0.3)
    figure.suptitle(heading, fontsize=12)
    return figure


def plot_signals(signals, column, heading):
    """Draw one column of `unit_signals` for several nets ({name: DataFrame}), a panel a depth."""
    depths = sorted({MODELS[name] for name in signals})
    figure, axes = plt.subplots(1, len(depths), figsize=(8, 3), sharey=True, layout="constrained", squeeze=False)
    for axis, depth in zip(axes.flat, depths):
        for name in sorted(name for name in signals if MODELS[name] == depth):
            values = signals[name][column].to_numpy()
            axis.plot(range(1, len(values) + 1), values, color=COLOURS[name], marker=".", label=title(name))
        axis.set(xlabel="unit", yscale="log" if column == "gradient" else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=10, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
        axis.grid(alpha=0.3)
    if column == "signal":
        axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel({"signal": "output, root mean square", "gradient": "gradient, norm"}[column])
    figure.suptitle(heading, fontsize=12)
    return figure


def plot_unit(model, unit, axis=None):
    """Draw one unit of a built net, such as "conv3_block1": the residual branch and, if there is one, the shortcut."""
    axis, colour = axis or plt.gca(), COLOURS.get(model.name, "#666666")
    layers = [layer for layer in model.layers if layer.name.startswith(unit + "_")]
    projection = [layer for layer in layers if "_0_" in layer.name]

    def words(layer):
        if layer.name.endswith("_add"):
            return "F(x) + " + ("$W_s$x" if projection else "x")
        if hasattr(layer, "kernel"):
            stride = f"\nstride {layer.strides[0]}" if layer.strides[0] > 1 else ""
            return f"{layer.kernel_size[0]}x{layer.kernel_size[0]} conv, {layer.filters}{stride}"
        return "batch norm" if layer.name.endswith("_bn") else "ReLU"

    def box(x, y, text):
        face = "#EEEEEE" if "F(x)" in text else "white"
        axis.text(x, y, text, ha="center", va="center", fontsize=10,
                  bbox={"boxstyle": "round,pad=0.3", "facecolor": face, "edgecolor": colour})

    main = ["x", *(words(layer) for layer in layers if layer not in projection)]
    arrow = {"arrowstyle": "->", "color": "#333333", "shrinkB": 9}  # in points: ends at the next box's edge
    for i, text in enumerate(main):
        axis.annotate("", (0, -i - 1), (0, -i), arrowprops=arrow)  # drawn first, so that its start hides behind the box
        box(0, -i, text)
    if any("F(x)" in text for text in main):
        side, end = 2.4, 2 - len(main)
        axis.plot([0, side, side, 0], [0, 0, end, end], color="#333333", linewidth=1.2, zorder=0)
        for i, layer in enumerate(projection):
            box(side, end / 2 + 0.6 - 1.2 * i, words(layer))
        if not projection:
            axis.text(side + 0.1, end / 2, "shortcut\n(identity)", va="center", fontsize=10)
    axis.set(xlim=(-1.3, 4), ylim=(-len(main) - 0.2, 0.6))
    axis.set_title(f"{title(model.name)}, {unit}", fontsize=11)
    axis.axis("off")
    return axis


def save_figure(figure, path):
    """Save a figure as PNG on white; the folder is made if needed."""
    _write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def save_text(text, path):
    """Save a text file; the folder is made if needed."""
    _write_whole(path, lambda file: file.write(text.encode()))
