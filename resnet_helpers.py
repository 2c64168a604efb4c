"""Plain and residual networks on cats_vs_dogs: the one helper module behind the notebooks.

"The paper" is He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
As a program it trains one run: python resnet_helpers.py '{"model": "resnet34", "seed": 1}'
"""

import base64
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
import zlib

PARENT = os.getppid()  # before the slow imports, during which it may end
# Read when TensorFlow is loaded: fast convolutions, few messages, GPU memory as needed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
if threads := os.environ.get("RESNET_THREADS"):  # for runs that share a machine
    os.environ |= {"TF_NUM_INTRAOP_THREADS": threads, "OMP_NUM_THREADS": threads}

import filelock
import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from keras import layers, ops

# ---- settings and files ----

PROFILES = {
    "full": {"train_images": 16_283, "val_images": 6_979, "epochs": 15},
    "quick": {"train_images": 1_280, "val_images": 512, "epochs": 4, "batch_size": 32},
    "test": {"train_images": 96, "val_images": 48, "epochs": 2},
}


def _folder(variable, default):
    return pathlib.Path(os.environ.get(variable) or default).expanduser().absolute()


RESULTS = _folder("RESNET_RESULTS", pathlib.Path(__file__).resolve().parent / "results")


def get_profile(name=None):
    """Return `name`, else the environment variable RESNET_PROFILE, else "full"."""
    return _require_one_of("profile", name or os.environ.get("RESNET_PROFILE") or "full", PROFILES)


def _require(condition, needed, received):
    if not condition:
        raise ValueError(f"Needed: {needed}. Received: {received}.")


def _require_one_of(what, received, allowed):
    _require(received in allowed, f"{what} out of {', '.join(map(str, allowed))}", repr(received))
    return received


def write_atomically(path, write):
    """Call `write(partial_path)` so that `path` ends up whole or untouched, whatever happens."""
    partial = path.with_name(f".{os.urandom(4).hex()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(f"Cannot write {path} ({error}). What was saved before is safe. "
                          "Make room, or set RESNET_RESULTS or RESNET_DATA to another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # there only if something went wrong


def _read_arrays(path, names):
    """Arrays from a file of np.savez; a damaged or foreign file raises ValueError."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return [file[name] for name in names]
    except Exception as error:  # a damaged zip can raise anything
        raise ValueError(f"{path} is damaged or another file ({error!r}). Move it away.") from error


# ---- data ----

DIGITS = "sklearn_digits"
# Arrays: the names (classes,); of both splits the images uint8 (n, size, size, 3) and labels int64 (n,).
Data = collections.namedtuple("Data", "class_names train_images train_labels val_images val_labels")


def data_dir():
    """The folder of the prepared data sets: TFDS_DATA_DIR, else TFDS's own default."""
    return _folder("TFDS_DATA_DIR", "~/tensorflow_datasets")


def _decoded(name, image_size):
    """Path of the file of decoded images; None if there is neither one nor a prepared data set."""
    stem, folder = f"{name}-{image_size}px", _folder("RESNET_DATA", "~/.cache/resnet_helpers")
    found = data_dir().glob(f"{name}/*.*.*/dataset_info.json")
    newest = max(found, default=None, key=lambda path: [int(n) for n in path.parent.name.split(".")])
    if newest is None:
        return next(folder.glob(f"{stem}-*.npz"), None)
    checksum = hashlib.sha256(newest.read_bytes()).hexdigest()[:8]  # tells copies of the data set apart
    return folder / f"{stem}-{checksum}.npz"


def prepare_dataset(profile=None):
    """Bring the data set to this machine, and return its name.

    Downloads cats_vs_dogs (787 MB) through TFDS unless it is there. Without a network, every profile but
    "full" falls back to scikit-learn's handwritten digits; other failures raise RuntimeError.
    """
    name, where = "cats_vs_dogs", data_dir()
    if _decoded(name, 32):
        return name
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cats_vs_dogs

    try:
        requests.head(cats_vs_dogs._URL, timeout=10, allow_redirects=True).raise_for_status()
        with filelock.FileLock(where / f"{name}.lock"):  # two may start at once
            tfds.builder(name, data_dir=where).download_and_prepare()
        return name
    except Exception as error:
        if get_profile(profile) == "full" or not isinstance(error, requests.exceptions.RequestException):
            raise RuntimeError(f"Preparing {name} in {where} failed ({error!s:.99}). Try again online, "
                               "set TFDS_DATA_DIR to a folder with it, or RESNET_PROFILE=quick.") from error
        print(f"!!! NO CATS, NO DOGS ({error!s:.99}). Handwritten digits ({DIGITS}) instead.")
    if not _decoded(DIGITS, 32):  # 1,797 images of 8x8 pixels
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.repeat((digits.images * 255 / 16).astype("uint8")[..., None], 3, axis=-1)
        examples = [(i, {"image": image, "label": digits.target[i]}) for i, image in enumerate(images)]
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3)),
                                               "label": tfds.features.ClassLabel(num_classes=10)})
        tfds.dataset_builders.store_as_tfds_dataset(
            DIGITS, "1.0.0", features, {"train": examples}, data_dir=where)
    return DIGITS


@functools.lru_cache(maxsize=1)
def load_data(name="cats_vs_dogs", image_size=32):
    """Return both splits (70% and 30%) as `Data`, resized.

    Decoded once per machine, into the folder RESNET_DATA (default ~/.cache/resnet_helpers), they need
    neither the prepared data set nor TensorFlow.
    """
    path = _decoded(name, image_size)
    if path is None:
        raise FileNotFoundError(f"{name} is not in {data_dir()}; call prepare_dataset() first.")
    if not path.exists():
        print(f"Decoding {name} to {image_size}x{image_size} pixels, once per machine ...", flush=True)
        arrays = _decode(name, image_size)
        write_atomically(path, lambda partial: np.savez(partial, **arrays._asdict()))
    return Data(*_read_arrays(path, Data._fields))


def _decode(name, image_size):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def resize(example):
        image = tf.image.resize(example["image"], [image_size, image_size], antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8), example["label"]

    builder, options, arrays = tfds.builder(name, data_dir=data_dir()), tf.data.Options(), []
    options.autotune.enabled = False  # it holds up the end of a pass by up to a minute
    for split in ("train[:70%]", "train[70%:]"):  # in a fixed order
        images = builder.as_dataset(split=split).map(resize, num_parallel_calls=os.cpu_count()).batch(512)
        arrays += map(np.concatenate, zip(*images.with_options(options).as_numpy_iterator()))
    return Data(np.array(builder.info.features["label"].names), *arrays)


def normalize(images):
    """uint8 (0 to 255) to float32 (0 to 1), any shape."""
    return images.astype("float32") / 255


def augment(images, rng):
    """Flip images with probability 1/2, shift them by up to 4 pixels (paper, section 4.2); shape stays."""
    size, count, out = images.shape[1], len(images), np.empty_like(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i, (flip, dy, dx) in enumerate(zip(rng.random(count) < 0.5, *rng.integers(0, 9, (2, count)))):
        out[i] = padded[i, dy : dy + size, dx : dx + size][:, :: -1 if flip else 1]
    return out


class Batches(keras.utils.PyDataset):
    """Batches of float32 images in 0 to 1, (batch, size, size, 3), and int labels, (batch,); each image once.

    For training, `seed_and_epoch` alone decides order and augmentation, so that a run can go on exactly.
    """

    def __init__(self, images, labels, batch_size=64, seed_and_epoch=None):
        super().__init__(workers=2)  # without workers, tf.data's autotuning holds up each epoch
        _require(0 < len(images) == len(labels), "a label per image", f"{len(labels)} for {len(images)}")
        self.images, self.labels, self.batch_size, self.key = images, labels, batch_size, seed_and_epoch
        rows = np.arange(len(images))
        self.order = np.random.default_rng(self.key).permutation(rows) if self.key else rows

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.images[rows]
        if self.key:
            images = augment(images, np.random.default_rng([*self.key, index]))
        return normalize(images), self.labels[rows]


# ---- models ----

SHORTCUTS = ("zero_pad", "projection", "projection_all")  # options A, B and C of the paper's section 4.1
UNITS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
DEPTHS = {depth: {"units_per_block": units, "channels": [64, 128, 256, 512], "bottleneck": depth >= 50,
                  "stem": "imagenet", "shortcut": "projection"} for depth, units in UNITS.items()}  # Table 1
DEPTHS |= {6 * n + 2: {"units_per_block": [n, n, n], "channels": [16, 32, 64], "bottleneck": False,
                       "stem": "cifar", "shortcut": "zero_pad"} for n in (3, 5, 7, 9, 18)}  # section 4.2
STEMS = {"imagenet": (7, 2, 32), "cifar": (3, 1, 8)}  # kernel size, stride, smallest image
MODELS = {f"{kind}{depth}": depth for depth in DEPTHS for kind in ("plain", "resnet")}


@keras.saving.register_keras_serializable("resnet_helpers")
class Conv2D(layers.Conv2D):
    """A convolution without bias, padded alike on all sides (Keras's "same" does so only at stride 1).

    An output of one pixel is a product of matrices, without the weights that see only padding: the same
    numbers in a third of the time.
    """

    def call(self, inputs):
        kernel, stride, pad = self.kernel, self.strides[0], self.kernel_size[0] // 2
        if max(inputs.shape[1:3]) <= stride:
            seen = inputs[:, : pad + 1, : pad + 1]
            seen_by = (*seen.shape[1:], self.filters)
            kernel = ops.slice(kernel, (pad, pad, 0, 0), seen_by)  # its gradient is cheaper than indexing's
            matrix = ops.reshape(kernel, (math.prod(seen.shape[1:]), self.filters))
            product = ops.matmul(ops.reshape(seen, (-1, matrix.shape[0])), matrix)
            return self.activation(ops.reshape(product, (-1, 1, 1, self.filters)))
        if stride == 1:
            return super().call(inputs)
        if pad:
            inputs = ops.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        return self.activation(ops.conv(inputs, kernel, stride, "valid", data_format="channels_last"))


@keras.saving.register_keras_serializable("resnet_helpers")
class BatchNormalization(layers.BatchNormalization):
    """Batch norm over the last axis of (batch, height, width, channels).

    Training on TensorFlow uses its fused operation, which equals Keras's ten to rounding and is faster.
    """

    def call(self, inputs, training=None, mask=None):
        if not training or not self.trainable or keras.backend.backend() != "tensorflow":
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon)
        count = ops.cast(tf.size(inputs) / inputs.shape[-1], variance.dtype)
        variance = variance * (count - 1) / count  # the unbiased one came, Keras keeps the other
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + now * (1 - self.momentum))
        return outputs


@keras.saving.register_keras_serializable("resnet_helpers")
class MirroredHeNormal(keras.initializers.Initializer):
    """share * M + (1 - share) * H: H is He's start (He et al. 2015b), M its mirrored form.

    Mirrored ("looks linear", Balduzzi et al. 2017): over halves of its input and output channels (`axes`), M
    is [[V, -V], [-V, V]] with V the first part of H, so that a weight of M has the variance of one of H. The
    layer puts out [Vu; -Vu], and since relu(u) - relu(-u) = u, the next one sees Vu as if there were no ReLU.
    """

    def __init__(self, share, axes=(-2, -1), seed=None):
        self.share, self.axes, self.seed = share, tuple(axes), seed

    def __call__(self, shape, dtype=None):
        he = keras.initializers.HeNormal(self.seed)(shape, dtype)
        if self.share == 0:
            return he
        mirrored = he
        for axis in self.axes:
            _require(shape[axis] % 2 == 0, "even numbers of channels, for mirrored", tuple(shape))
            half = ops.split(mirrored, 2, axis)[0]
            mirrored = ops.concatenate([half, -half], axis)
        return self.share * mirrored + (1 - self.share) * he

    def get_config(self):
        return {"share": self.share, "axes": self.axes, "seed": self.seed}


def conv_bn(x, filters, kernel_size, stride, name, seed=None, gamma="ones", mirrored=0.0, axes=(-2, -1)):
    """Convolution without bias (the batch norm after it has one), He's start or `mirrored`, batch norm."""
    if seed is not None:  # by name, so that twins start from the same weights
        seed = zlib.crc32(f"{seed} {name}".encode())
    x = Conv2D(filters, kernel_size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv",
               kernel_initializer=MirroredHeNormal(mirrored, axes, seed))(x)
    return BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=f"{name}_bn")(x)


def build_unit(x, kernel_sizes, channel_sizes, stride, name, *, is_plain=False, shortcut="projection",
               stride_in="1x1", zero_gamma=False, shortcut_scale=1.0, mirrored=0.0, seed=None):
    """One unit: y = relu(F(x) + x), or relu(F(x) + W_s x) with a projection (paper, equations 1 and 2).

    Args:
        x: Keras tensor, (batch, height, width, channels).
        kernel_sizes, channel_sizes: Such as (3, 3) and (64, 64), or (1, 3, 1) and (64, 64, 256).
        name: What the names of its layers begin with.
        is_plain: Leave the shortcut out and change nothing else: y = relu(F(x)).
        shortcut: Where the shape changes, "zero_pad" (option A of section 4.1) or "projection" (B);
            "projection_all" projects in every unit (C).
        stride_in: Where a bottleneck strides, which the paper leaves open: in its first "1x1", as in the
            authors' released networks, or in its "3x3" ("v1.5").
        zero_gamma: Start with F(x) = 0: the last batch norm's scale is 0 (Goyal et al. 2017).
        shortcut_scale: a in y = relu(F(x) + a x): 1 in the paper, 0 would leave no shortcut.
        mirrored: 0 is He's start, 1 a start in which the network is linear (`MirroredHeNormal`).
        seed: Makes the initial weights reproducible.
    """
    _require(0 < len(kernel_sizes) == len(channel_sizes), "equal lengths > 0", (kernel_sizes, channel_sizes))
    _require(not (is_plain and zero_gamma), "shortcuts, for zero_gamma", "is_plain=True")
    _require(not (is_plain and shortcut_scale != 1), "shortcuts, for shortcut_scale", "is_plain=True")
    _require(0 <= mirrored <= 1, "mirrored from 0 to 1", mirrored)
    _require_one_of("shortcut", shortcut, SHORTCUTS)
    _require_one_of("stride_in", stride_in, ("1x1", "3x3"))
    last, filters = len(kernel_sizes) - 1, channel_sizes[-1]
    strided = int(stride_in == "3x3" and kernel_sizes[0] == 1)
    branch = x  # becomes F(x), the residual branch
    for i, (kernel_size, channels) in enumerate(zip(kernel_sizes, channel_sizes)):
        own_stride, gamma = stride if i == strided else 1, "zeros" if zero_gamma and i == last else "ones"
        branch = conv_bn(
            branch, channels, kernel_size, own_stride, f"{name}_{i + 1}", seed, gamma, mirrored)
        if i < last:
            branch = layers.Activation("relu", name=f"{name}_{i + 1}_relu")(branch)
    if not is_plain:
        if shortcut == "projection_all" or (shortcut == "projection" and branch.shape != x.shape):
            x = conv_bn(x, filters, 1, stride, f"{name}_0", seed, mirrored=mirrored)  # W_s x
        elif branch.shape != x.shape:
            _require(filters >= x.shape[-1], "a projection where channels become fewer", shortcut)
            x = ops.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))
        if shortcut_scale != 1:
            x = layers.Rescaling(shortcut_scale, name=f"{name}_scale")(x)  # a x
        branch = layers.Add(name=f"{name}_add")([x, branch])  # F(x) + x
    return layers.Activation("relu", name=f"{name}_out")(branch)


def build_resnet_block(
        input_layer, block_num, num_units, kernel_sizes, channel_sizes, *, stride=None, **options):
    """Build one stage of the paper's Table 1: `block_num` 2 is conv2_x, ..., 5 is conv5_x.

    `stride`, by which the first unit divides height and width, is 1 in conv2_x and else 2 by default.
    `options` (is_plain, shortcut, stride_in, zero_gamma, shortcut_scale, mirrored, seed) and the rest are
    those of `build_unit`.
    """
    _require(num_units > 0, "num_units of at least 1", num_units)
    stride, x = stride or (1 if block_num == 2 else 2), input_layer
    for unit in range(1, num_units + 1):
        name = f"conv{block_num}_block{unit}"
        x = build_unit(x, kernel_sizes, channel_sizes, stride if unit == 1 else 1, name, **options)
    return x


def build_resnet(input_shape, units_per_block, channels, num_classes, *, bottleneck=False,
                 stem="imagenet", mirrored=0.0, seed=None, name=None, **options):
    """Build a whole network as in Table 1; it ends in logits, (batch, num_classes), not in probabilities.

    Args:
        input_shape: (height, width, channels), at least 32 pixels each way (8 with the "cifar" stem).
        units_per_block, channels: Of each stage, such as [3, 4, 6, 3] and [64, 128, 256, 512].
        bottleneck: Units of 1x1, 3x3 and 1x1 (four times the channels), not two 3x3 (paper, Figure 5).
        stem: "imagenet" (7x7 stride 2 and max pool, Table 1) or "cifar" (3x3 stride 1, no pool, section 4.2).
        mirrored, seed, options: `is_plain` and the others of `build_unit`.
    """
    kernel_size, stride, least = STEMS[_require_one_of("stem", stem, STEMS)]
    _require(len(input_shape) == 3 and min(input_shape[:2]) >= least,
             f"input_shape (height, width, channels), at least {least} pixels each way", tuple(input_shape))
    _require(num_classes >= 2, "num_classes of at least 2", num_classes)
    _require(0 < len(units_per_block) == len(channels), "equal lengths > 0", (units_per_block, channels))
    image = keras.Input(input_shape, name="image")
    # An image's channels have no mirrored halves: only the output's.
    x = conv_bn(image, channels[0], kernel_size, stride, "conv1", seed, mirrored=mirrored, axes=(-1,))
    x = layers.Activation("relu", name="conv1_relu")(x)
    if stem == "imagenet":
        x = layers.ZeroPadding2D(1, name="pool1_pad")(x)  # harmless after a ReLU
        x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for block_num, (num_units, width) in enumerate(zip(units_per_block, channels), start=2):
        unit = ((1, 3, 1), (width, width, 4 * width)) if bottleneck else ((3, 3), (width, width))
        x = build_resnet_block(x, block_num, num_units, *unit, mirrored=mirrored, seed=seed, **options)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    start = keras.initializers.HeNormal(seed)
    logits = layers.Dense(num_classes, kernel_initializer=start, name="predictions")(x)
    return keras.Model(image, logits, name=name)


def create_model(name, input_shape=(32, 32, 3), num_classes=2, **options):
    """Build "resnet" or "plain" with a depth of Table 1 or section 4.2; `options` as in `build_resnet`."""
    plan = DEPTHS[MODELS[_require_one_of("model", name, MODELS)]] | {"is_plain": name.startswith("plain")}
    return build_resnet(input_shape, num_classes=num_classes, name=name, **plan | options)


def load_trained(name):
    """Return a network of section 4.2 with its trained weights from results/weights."""
    folder = pathlib.Path(__file__).resolve().parent / "results" / "weights"
    known = sorted(path.name.split(".")[0] for path in folder.glob("*.weights.h5"))
    model = create_model(_require_one_of("trained network", name, known))
    model.load_weights(folder / f"{name}.weights.h5")
    return model


def display_name(model):
    """ "resnet34" to "ResNet-34", "plain34" to "plain-34"."""
    return model.replace("resnet", "ResNet-").replace("plain", "plain-")


# ---- training ----


def make_config(model, profile=None, dataset="cats_vs_dogs", seed=0, **changes):
    """Return a run's configuration, a dict of all that decides it; `changes` override entries."""
    plan, is_plain = DEPTHS[MODELS[_require_one_of("model", model, MODELS)]], model.startswith("plain")
    config = {
        "model": model, "dataset": dataset, "image_size": 32, "batch_size": 64,
        **PROFILES[get_profile(profile)], "optimizer": "adam", "learning_rate": 1e-3,
        "schedule": "half an epoch up, cosine down", "augmentation": "flips, 4-pixel shifts",
        "stem": plan["stem"], "stride_in": "1x1", "zero_gamma": False, "mirrored": 0.0,
        "shortcut_scale": 1.0, "shortcut": "none" if is_plain else plan["shortcut"], "seed": seed,
        "profile": get_profile(profile)}
    if dataset == DIGITS:  # there are no more
        config |= {key: min(config[key], n) for key, n in (("train_images", 1_258), ("val_images", 539))}
    allowed = {key: [config[key]] for key in ("schedule", "augmentation")}  # always the same
    allowed |= {"optimizer": OPTIMIZERS, "shortcut": ["none"] if is_plain else SHORTCUTS}
    for key, value in changes.items():
        _require_one_of("entry of a configuration", key, config)
        value = _require_one_of(key, value, allowed.get(key, [value]))
        config[key] = float(value) if isinstance(config[key], float) else value
    _require(0 <= config["mirrored"] <= 1, "mirrored from 0 to 1", config["mirrored"])
    unused = {"zero_gamma": False, "shortcut_scale": 1.0}
    _require(not is_plain or all(config[key] == value for key, value in unused.items()),
             f"shortcuts, for {' and '.join(unused)}", model)
    return json.loads(json.dumps(config, default=lambda number: number.item()))  # Python numbers


def run_path(config, folder=None):
    """Where a run's file lies; its name has every entry that is not the usual one."""
    usual = make_config(config["model"], config["profile"], config["dataset"], config["seed"])
    changed = "".join(f"-{key}_{config[key]}" for key in usual if config[key] != usual[key])
    folder = pathlib.Path(folder or RESULTS / config["profile"] / config["dataset"]).absolute()
    return folder / f"{config['model']}{changed}-seed{config['seed']}.json"


@keras.saving.register_keras_serializable("resnet_helpers")
class Adam(keras.optimizers.Adam):
    """Adam (Kingma and Ba 2015); with TensorFlow in one pass over the weights, not Keras's ten."""

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow":
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index, step = self._get_variable_index(variable), ops.cast(self.iterations + 1, variable.dtype)
        m, v = (each[index].value.handle for each in (self._momentums, self._velocities))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=m, v=v, beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon,
            beta1_power=self.beta_1**step, beta2_power=self.beta_2**step, grad=gradient,
            lr=ops.cast(learning_rate, variable.dtype))


OPTIMIZERS = {"adam": Adam, "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9)}


def learning_rate(config):
    """The schedule: for half an epoch up to config["learning_rate"], then along a cosine down to 0."""
    epoch = math.ceil(config["train_images"] / config["batch_size"])  # in steps
    up = max(1, epoch // 2)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, config["epochs"] * epoch - up), warmup_target=config["learning_rate"], warmup_steps=up)


def build_from_config(config, num_classes):
    """The compiled network of a configuration."""
    keys = ("stem", "stride_in", "zero_gamma", "shortcut_scale", "mirrored", "shortcut", "seed")
    options = {key: config[key] for key in keys if config[key] != "none"}
    model = create_model(config["model"], (config["image_size"],) * 2 + (3,), num_classes, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    slow = keras.backend.backend() == "tensorflow" and _device().startswith("CPU")  # XLA is, there
    optimizer = OPTIMIZERS[config["optimizer"]](learning_rate(config))
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False if slow else "auto")
    # Metrics made in the first step would have TensorFlow trace it twice.
    model.compute_metrics(None, np.zeros(1), np.zeros((1, num_classes)))
    return model


def _device():
    place = str(ops.zeros(()).device).upper()
    return ("CPU " if "CPU" in place else "GPU ") + platform.machine()


def _commit():
    """The commit of the repository that this module lies in, None outside of one."""
    command = ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(data):
    """What is saved with a run: versions, device, threads, start, commit, checksums of images and labels."""
    backend = keras.backend.backend()
    return {"python": platform.python_version(), "keras": keras.__version__, "backend": backend,
            backend: sys.modules[backend].__version__, "numpy": np.__version__, "device": _device(),
            "threads": int(threads or os.cpu_count()), "date": time.strftime("%Y-%m-%d"),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": _commit(),
            "images_crc32": zlib.crc32(data.val_images, zlib.crc32(data.train_images)),
            "labels_crc32": zlib.crc32(data.val_labels, zlib.crc32(data.train_labels))}


def train_run(config, folder=None, keep_weights=False, verbose=True):
    """Train one network in this process, or load its run if that is there, and return the run as a dict.

    Every finished epoch is saved: a run that was cut off goes on from there, to the same history.
    `keep_weights` also saves the final weights, as <name>.weights.h5. Raises ValueError where files of this
    name belong to another run, RuntimeError where another process trains it.
    """
    path = run_path(config, folder)
    if not path.exists():
        lock = path.with_suffix(".lock")
        try:
            with filelock.FileLock(lock, timeout=10):  # an ending process may still hold it
                if not path.exists():
                    _train(config, path, keep_weights, verbose)
            lock.unlink(missing_ok=True)
        except filelock.Timeout:
            raise RuntimeError(f"Another process trains {path.stem} ({lock}). Wait, or stop it.") from None
    run = read_run(path)
    _refuse_another(path, config, run["config"])
    return run


def _refuse_another(path, wanted, found):
    differ = [f"{key}: {found.get(key)!r}, wanted {value!r}" for key, value in wanted.items()
              if found.get(key) != value]
    if differ:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differ)}). Move it away.")


def _train(config, path, keep_weights, verbose):
    for left in path.parent.glob(f".*.{path.stem}.*"):  # by a kill while writing
        left.unlink()
    if config["dataset"] != DIGITS:
        prepare_dataset("full")
    data = load_data(config["dataset"], config["image_size"])
    n, m, there = config["train_images"], config["val_images"], (len(data.train_images), len(data.val_images))
    _require(0 < n <= there[0] and 0 < m <= there[1], f"train_images and val_images up to {there}", (n, m))
    val = Batches(data.val_images[:m], data.val_labels[:m], config["batch_size"])
    model = build_from_config(config, len(data.class_names))
    model.optimizer.build(model.trainable_variables)
    state = [*model.variables, *model.optimizer.variables]
    checkpoint, history = path.with_suffix(".checkpoint.npz"), {key: [] for key in HISTORY}
    run = {"config": config, "status": "finished", "history": history, "environment": environment(data)}
    if checkpoint.exists():
        run |= _restore(checkpoint, run, state)
    while (epoch := len(run["history"]["loss"])) < config["epochs"] and run["status"] == "finished":
        start, key = time.perf_counter(), (config["seed"], epoch)
        train = Batches(data.train_images[:n], data.train_labels[:n], config["batch_size"], key)
        logs = model.fit(train, validation_data=val, shuffle=False, verbose=0).history
        logs["seconds"] = [round(time.perf_counter() - start, 3)]
        for key, values in run["history"].items():
            values += [float(v) if math.isfinite(v) else None for v in logs[key]]  # JSON has no NaN
        if None in run["history"]["loss"] + run["history"]["val_loss"]:
            run["status"] = "diverged"
        arrays = {str(i): variable for i, variable in enumerate(state)}
        write_atomically(checkpoint, functools.partial(np.savez, run=json.dumps(run), **arrays))
        if verbose:
            print(_epoch_line(_run_table(run, path)), flush=True)
    if run["status"] == "finished":
        classes = model.predict(val, verbose=0).argmax(-1).astype("uint8")
        run["val_predictions"] = base64.b64encode(zlib.compress(classes.tobytes())).decode()
    if keep_weights:  # of a copy: a compiled model would also save its optimiser
        copy = keras.Model(model.input, model.output, name=model.name)
        write_atomically(path.with_suffix(".weights.h5"), copy.save_weights)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(run, indent=1) + "\n"))
    checkpoint.unlink(missing_ok=True)


def _restore(path, run, state):
    """Put network and optimiser back to the last finished epoch; return the run."""
    saved, *values = _read_arrays(path, ["run", *map(str, range(len(state)))])
    saved = json.loads(str(saved))
    before, now = saved["environment"], run["environment"]
    _refuse_another(path, run["config"] | {key: now[key] for key in MACHINE}, saved["config"] | before)
    for variable, value in zip(state, values):
        variable.assign(value)
    saved["earlier_environments"] = [*saved.get("earlier_environments", []), before]
    print(f"Going on after epoch {len(saved['history']['loss'])} of {saved['config']['epochs']}.", flush=True)
    return saved | {"environment": now}


def _epoch_line(table, i=-1):
    row = table.iloc[i]
    return (f"{display_name(row.model)}, seed {row.seed}, epoch {row.epoch}/{row.epochs}: "
            f"loss {row.loss:.3f}, accuracy {row.accuracy:.1%}, validation {row.val_accuracy:.1%}, "
            f"{row.seconds:.0f} s, {(row.epochs - row.epoch) * table.seconds.median() / 60:.1f} min left")


def train_runs(configs, executor=None, folder=None, keep_weights=False):
    """Train each run in a process of its own, or load it if it is there; return all as `read_runs` does.

    Prints a line per epoch; in Jupyter a figure grows. When this call ends, so do its processes; finished
    epochs are kept. `executor` is any `concurrent.futures.Executor`, such as ThreadPoolExecutor(2) for two
    runs side by side, or a cluster's; by default runs follow one another.
    """
    _require(configs, "at least 1 configuration", configs)
    paths = {run_path(config, folder): config for config in configs}
    tables, jobs, shown = {path: _table_so_far(path, pd.DataFrame()) for path in paths}, {}, None
    lease = next(iter(paths)).with_name(f".{os.urandom(4).hex()}.lease")  # without it, its processes end
    with contextlib.ExitStack() as stack:
        executor = executor or stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        for path, config in paths.items():
            if path.exists():
                print(f"{path.stem}: loaded, not trained again")
                continue
            write_atomically(lease, pathlib.Path.touch)
            stack.callback(lease.unlink, missing_ok=True)
            options = {"folder": str(path.parent), "keep_weights": keep_weights, "verbose": False}
            command = [sys.executable, os.path.abspath(__file__), *map(json.dumps, [config, options]), lease]
            jobs[path] = executor.submit(subprocess.run, command, capture_output=True, text=True)
            stack.callback(jobs[path].cancel)
        unfinished = set(jobs)
        while unfinished:
            time.sleep(0.5)
            ended = {path for path in unfinished if jobs[path].done()}  # before reading: no epoch is missed
            for number, path in enumerate(paths, 1):
                known = len(tables[path])
                if path in unfinished:
                    tables[path] = _table_so_far(path, tables[path])
                for i in range(known, len(tables[path])):
                    print(f"[{number}/{len(paths)}] {_epoch_line(tables[path], i)}", flush=True)
                if len(tables[path]) > known and "ipykernel" in sys.modules:
                    from IPython.display import display

                    figure = plot_histories(pd.concat(tables.values(), ignore_index=True))
                    shown = shown or display(display_id=True)
                    shown.update(figure)
                    plt.close(figure)
            unfinished -= ended
    for path, job in jobs.items():
        process = job.result()
        print(process.stdout, end="", flush=True)
        if status := process.returncode:  # below 0: by a signal
            reason = ["Was it killed, or out of memory?", *process.stderr.splitlines()][-(status > 0)]
            raise RuntimeError(f"{path.stem} ended with status {status}. {reason}")
    runs = [_run_table(train_run(config, folder), path) for path, config in paths.items()]
    return pd.concat(runs, ignore_index=True)


def _table_so_far(path, known):
    """A run's finished epochs, from its files; else those known."""
    with contextlib.suppress(Exception):  # not there yet, or just being replaced
        if path.exists():
            return _run_table(read_run(path), path)
        saved = _read_arrays(path.with_suffix(".checkpoint.npz"), ["run"])
        return _run_table(json.loads(str(saved[0])), path)
    return known


# ---- results ----

HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")  # one number per epoch each
MACHINE = ("backend", "device", "images_crc32", "labels_crc32")  # what stays through a run
NETWORK = ["model", "shortcut", "zero_gamma"]  # what an ablation varies


def read_run(path):
    """Read one run's file as a dict; options younger than the file have their usual values."""
    try:
        run = json.loads(pathlib.Path(path).read_text())
        history = {key: run["history"][key] for key in HISTORY}
        return run | {"config": make_config(**run["config"]), "history": history}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or another file ({error!r}). Move it away.") from error


def read_runs(folder):
    """Read a folder's runs: a DataFrame with a row per epoch, its history beside its configuration."""
    tables = [_run_table(read_run(path), path) for path in sorted(pathlib.Path(folder).glob("*.json"))]
    if not tables:
        raise FileNotFoundError(f"No runs in {folder}. Notebook 3 trains them.")
    return pd.concat(tables, ignore_index=True)


def _run_table(run, path):
    table = pd.DataFrame(run["history"], dtype=float).assign(file=path.name, status=run["status"])
    machine = {key: run["environment"].get(key, math.nan) for key in MACHINE}
    return table.assign(epoch=range(1, len(table) + 1), **run["config"], **machine)


def ablation_table(runs, metric="val_accuracy", rates=None):
    """Plain against residual after equal epochs: a row per depth (and kind of shortcut), means over seeds.

    `rates`, a learning rate per model, picks each network's own runs. Columns: plain, residual, difference,
    seeds (of both); with several also standard deviations and the half width of the difference's 95%
    confidence interval, paired by seed. NaN: a run diverged. Raises ValueError if other settings differ.
    """
    if rates is not None:
        runs = runs[runs.learning_rate == runs.model.map(rates)].assign(learning_rate="own")
    for key in [*make_config("plain18"), *MACHINE]:
        files = runs.groupby(key).file.unique().map(list)  # without those older than a checksum
        if len(files) > 1 and key not in [*NETWORK, "seed"]:
            raise ValueError(f"These runs cannot be compared: they differ in {key} ({files.to_dict()}).")
    last, rows = runs.groupby("file").tail(1), {}
    last = last.assign(score=last[metric].where(last.status != "diverged"))
    arms = {arm: part.set_index("seed").score for arm, part in last.groupby(NETWORK)}
    for arm in sorted((arm for arm in arms if arm[1] != "none"), key=lambda arm: (MODELS[arm[0]], arm)):
        (model, shortcut, zero_gamma), depth = arm, MODELS[arm[0]]
        twin = (f"plain{depth}", "none", False)
        _require(twin in arms, f"runs of {twin[0]} beside {model}", [arm[0] for arm in arms])
        pair = pd.concat({"plain": arms[twin], "residual": arms[arm]}, axis=1, join="inner")  # seeds of both
        pair["difference"] = pair.residual - pair.plain
        row, n = {**pair.mean(skipna=False), "seeds": len(pair)}, len(pair)
        if n > 1:
            row |= {f"{column} sd": sd for column, sd in pair.std(skipna=False).items()}
            row["95% half width"] = scipy.stats.t.ppf(0.975, n - 1) * row["difference sd"] / math.sqrt(n)
        unusual = f", {shortcut}" * (shortcut != DEPTHS[depth]["shortcut"]) + ", zero gamma" * zero_gamma
        rows[f"{depth} layers{unusual}"] = row
    return pd.DataFrame.from_dict(rows, orient="index")


# ---- plots ----

# Hue is the kind, warm for plain and cool for residual; shade is the depth.
COLOURS = {f"{kind}{depth}": colour for kind, palette in (("plain", "YlOrRd"), ("resnet", "YlGnBu"))
           for family in (list(DEPTHS)[:5], list(DEPTHS)[5:])
           for depth, colour in zip(family, sns.color_palette(palette, 8).as_hex()[3:])}
sns.set_theme(style="whitegrid", font_scale=11 / 12, rc={
    "figure.dpi": 90, "savefig.dpi": 180, "savefig.facecolor": "white", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False})


def plot_histories(runs):
    """Draw losses and accuracies against epochs, a column per depth, a colour per network.

    Training is solid, validation dashed; with several seeds a line is their mean and a band their range.
    """
    keys = ["loss", "val_loss", "accuracy", "val_accuracy"]
    runs = runs.assign(network=runs.model.map(display_name), layers=runs.model.map(MODELS))
    long = runs.melt(["network", "layers", "seed", "epoch"], keys, var_name="metric")
    long["part"] = np.where(long.metric.str.startswith("val_"), "validation", "training")
    long["metric"] = long.metric.str.removeprefix("val_").replace("accuracy", "accuracy, %")
    long.loc[long.metric != "loss", "value"] *= 100
    grid = sns.relplot(
        long, x="epoch", y="value", row="metric", col="layers", hue="network", style="part", kind="line",
        palette={display_name(model): colour for model, colour in COLOURS.items()}, errorbar=("pi", 100),
        marker="o", markersize=3, markeredgewidth=0, height=2.5, aspect=1.1,
        facet_kws={"sharey": "row", "margin_titles": True})
    grid.set_titles(col_template="{col_name} layers", row_template="").set_axis_labels("epoch")
    for metric, axis in zip(grid.row_names, grid.axes[:, 0]):
        axis.set_ylabel(metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return grid.figure


if __name__ == "__main__":  # configuration and options of train_run as JSON, train_runs's lease
    config, options, lease = sys.argv[1:] + ["{}", ""][len(sys.argv) - 2 :]

    def end_with_parent():  # nothing trains for nobody
        while os.path.exists(lease) and os.getppid() == PARENT:
            time.sleep(0.5)
        os._exit(1)

    if lease:
        threading.Thread(target=end_with_parent, daemon=True).start()
    train_run(make_config(**json.loads(config)), **json.loads(options))
