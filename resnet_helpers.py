"""Plain and residual networks on cats_vs_dogs: the one helper module behind the notebooks.

"The paper" is He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
Six parts, in this order: settings and files, data, models, training, results, plots.
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

PARENT = os.getppid()  # before the slow imports below, during which it may end
# TensorFlow reads these when it is loaded. Its fast convolutions (oneDNN) are off on many processors, its
# information lines are on, and on a GPU it would take all memory at once.
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

# ---- settings and files ----

PROFILES = {
    "full": {"train_images": 16_283, "val_images": 6_979, "epochs": 15},
    "quick": {"train_images": 1_536, "val_images": 1_024, "epochs": 4, "batch_size": 32},
    "test": {"train_images": 96, "val_images": 48, "epochs": 2},
}


def _folder(variable, default):
    """The folder that an environment variable names; unset or empty means `default`."""
    return pathlib.Path(os.environ.get(variable) or default).expanduser().absolute()


RESULTS = _folder("RESNET_RESULTS", pathlib.Path(__file__).resolve().parent / "results")


def get_profile(name=None):
    """Return the profile's name: `name`, else the environment variable RESNET_PROFILE, else "full"."""
    return _require_one_of("profile", name or os.environ.get("RESNET_PROFILE") or "full", PROFILES)


def _require(condition, needed, received):
    if not condition:
        raise ValueError(f"Needed: {needed}. Received: {received}.")


def _require_one_of(what, received, allowed):
    _require(received in allowed, f"{what} out of {', '.join(map(str, allowed))}", repr(received))
    return received


def write_atomically(path, write):
    """Call `write(partial_path)` so that `path` ends up whole or untouched, whatever happens meanwhile."""
    partial = path.with_name(f".{os.urandom(4).hex()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(f"Cannot write {path} ({error.strerror or error}). What was saved before is safe. "
                          "Make room, or set RESNET_RESULTS or RESNET_DATA to another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # it is there only if something went wrong


# ---- data ----

DIGITS = "sklearn_digits"
# Arrays: the names (classes,), and for both splits images uint8 (n, size, size, 3) and labels int64 (n,).
Data = collections.namedtuple("Data", "class_names train_images train_labels val_images val_labels")


def data_dir():
    """The folder of the prepared data sets: TFDS_DATA_DIR, else TFDS's own default."""
    return _folder("TFDS_DATA_DIR", "~/tensorflow_datasets")


def _prepared(name):
    """Path of the newest prepared version's dataset_info.json, or None (without importing TFDS)."""
    found = data_dir().glob(f"{name}/*.*.*/dataset_info.json")
    return max(found, default=None, key=lambda path: [int(n) for n in path.parent.name.split(".")])


def _decoded(name, image_size):
    """Path of the file of decoded images; None if there is neither one nor a source for it."""
    folder, source = _folder("RESNET_DATA", "~/.cache/resnet_helpers"), _prepared(name)
    if source:  # its checksum tells this copy of the data set from others
        return folder / f"{name}-{image_size}px-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.npz"
    return next(folder.glob(f"{name}-{image_size}px-*.npz"), None)


def prepare_dataset(profile=None):
    """Make sure that the data set is on this machine, and return its name.

    Downloads cats_vs_dogs (787 MB) through TFDS unless `data_dir()` has it. Where it cannot be reached, every
    profile but "full" falls back to scikit-learn's handwritten digits; else a RuntimeError says what to do.
    """
    name, where = "cats_vs_dogs", data_dir()
    if _decoded(name, 32):
        return name
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cats_vs_dogs

    try:
        requests.head(cats_vs_dogs._URL, timeout=10, allow_redirects=True).raise_for_status()
        tfds.builder(name, data_dir=where).download_and_prepare()
        return name
    except Exception as error:
        if get_profile(profile) == "full" or not isinstance(error, requests.exceptions.RequestException):
            raise RuntimeError(
                f"Downloading or preparing cats_vs_dogs in {where} broke off ({error!r}). Run again with a "
                "network, set TFDS_DATA_DIR to a folder that has the data set, or RESNET_PROFILE=quick, "
                "which can use other data.") from error
        print(f"!!! NO CATS, NO DOGS: cats_vs_dogs cannot be downloaded ({error!r}).\n"
              f"!!! This run uses scikit-learn's handwritten digits instead ({DIGITS}, 10 classes).")
    if not _prepared(DIGITS):  # store them once as a TFDS data set: 1,797 images of 8x8 pixels
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.repeat((digits.images * 255 / 16).astype("uint8")[..., None], 3, axis=-1)
        examples = [(i, {"image": image, "label": digits.target[i]}) for i, image in enumerate(images)]
        image, label = tfds.features.Image(shape=(8, 8, 3)), tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        tfds.dataset_builders.store_as_tfds_dataset(
            DIGITS, "1.0.0", features, {"train": examples}, data_dir=where)
    return DIGITS


@functools.lru_cache(maxsize=1)
def load_data(name="cats_vs_dogs", image_size=32):
    """Return both splits (70% and 30%) as `Data`, resized; decoded once per machine and kept in one file.

    That file lies in the folder RESNET_DATA (default ~/.cache/resnet_helpers); with it, neither the prepared
    data set nor TensorFlow is needed.
    """
    path = _decoded(name, image_size)
    if path is None:
        raise FileNotFoundError(f"{name} is not prepared in {data_dir()}; call prepare_dataset() first.")
    if not path.exists():
        print(f"Decoding {name} to {image_size}x{image_size} pixels, once on this machine ...", flush=True)
        arrays = _decode(name, image_size)
        write_atomically(path, lambda partial: np.savez(partial, **arrays._asdict()))
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return Data(*(file[key] for key in Data._fields))
    except Exception as error:  # a damaged zip can raise nearly anything
        raise ValueError(f"{path} is damaged or not a file of load_data ({error!r}). Remove it.") from error


def _decode(name, image_size):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def resize(example):
        image = tf.image.resize(example["image"], [image_size, image_size], antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8), example["label"]

    options, arrays = tf.data.Options(), []
    options.autotune.enabled = False  # its thread holds up the end of a pass by up to a minute
    splits, info = tfds.load(
        name, split=["train[:70%]", "train[70%:]"], data_dir=data_dir(), with_info=True, download=False,
        read_config=tfds.ReadConfig(options=options, try_autocache=False))
    for split in splits:  # in a fixed order
        batches = split.map(resize, num_parallel_calls=os.cpu_count()).batch(512).as_numpy_iterator()
        arrays += map(np.concatenate, zip(*batches))
    return Data(np.array(info.features["label"].names), *arrays)


def normalize(images):
    """uint8 (0 to 255) to float32 (0 to 1), any shape."""
    return images.astype("float32") / 255


def augment(images, rng):
    """Flip images with probability 1/2, shift them by up to 4 pixels (paper, section 4.2); shape stays."""
    size, count = images.shape[1], len(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (flip, dy, dx) in enumerate(zip(rng.random(count) < 0.5, *rng.integers(0, 9, (2, count)))):
        image = padded[i, dy : dy + size, dx : dx + size]
        out[i] = image[:, ::-1] if flip else image
    return out


class Batches(keras.utils.PyDataset):
    """Batches of float32 images in 0 to 1, (batch, size, size, 3), and int labels, (batch,); each image once.

    Validation passes come as they are. For training, `seed_and_epoch` alone decides the order and the
    augmentation, so that a run can stop and go on exactly.
    """

    def __init__(self, images, labels, batch_size=64, seed_and_epoch=None):
        super().__init__(workers=2)  # without workers, tf.data's autotuning holds up each epoch
        _require(0 < len(images) == len(labels), "labels for all images", f"{len(labels)} for {len(images)}")
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
SMALLEST = {"imagenet": 32, "cifar": 8}  # the stems, and the smallest image that each leaves something of
MODELS = {f"{kind}{depth}": depth for depth in DEPTHS for kind in ("plain", "resnet")}


@keras.saving.register_keras_serializable("resnet_helpers")
class Conv2D(keras.layers.Conv2D):
    """A convolution without bias that pads alike on all sides (Keras's "same" does so only at stride 1).

    Where the output is one pixel, it leaves out the weights that can only see padding: a small product of
    matrices, with the same numbers and gradients in a third of the time.
    """

    def call(self, inputs):
        kernel, stride, pad = self.kernel, self.strides[0], self.kernel_size[0] // 2
        if max(inputs.shape[1:3]) <= stride:
            seen = inputs[:, : pad + 1, : pad + 1]
            kernel = kernel[pad : pad + seen.shape[1], pad : pad + seen.shape[2]]
            matrix = keras.ops.reshape(kernel, (math.prod(seen.shape[1:]), self.filters))
            product = keras.ops.matmul(keras.ops.reshape(seen, (-1, matrix.shape[0])), matrix)
            return self.activation(keras.ops.reshape(product, (-1, 1, 1, self.filters)))
        if stride == 1:
            return super().call(inputs)
        if pad:
            inputs = keras.ops.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        outputs = keras.ops.conv(inputs, kernel, stride, "valid", data_format="channels_last")
        return self.activation(outputs)


def conv_bn(x, filters, kernel_size, stride, name, seed=None, gamma="ones"):
    """Convolution without bias (the batch norm after it has one), He initialisation, batch norm."""
    if seed is not None:  # by name, so that twins start from the same weights in the layers that they share
        seed = zlib.crc32(f"{seed} {name}".encode())
    x = Conv2D(filters, kernel_size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv",
               kernel_initializer=keras.initializers.HeNormal(seed))(x)
    return keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=f"{name}_bn")(x)


def build_unit(x, kernel_sizes, channel_sizes, stride, name, *, is_plain=False, shortcut="projection",
               stride_in="1x1", zero_gamma=False, seed=None):
    """One unit: y = relu(F(x) + x), or with a projection y = relu(F(x) + W_s x) (paper, equations 1 and 2).

    `is_plain` leaves the shortcut out: y = relu(F(x)). See `build_resnet_block` for the arguments.
    """
    last, filters = len(kernel_sizes) - 1, channel_sizes[-1]
    strided = 0 if stride_in == "1x1" else next((i for i, k in enumerate(kernel_sizes) if k > 1), 0)
    branch = x  # becomes F(x), the residual branch
    for i, (kernel_size, channels) in enumerate(zip(kernel_sizes, channel_sizes)):
        gamma = "zeros" if zero_gamma and i == last else "ones"
        own_stride = stride if i == strided else 1
        branch = conv_bn(branch, channels, kernel_size, own_stride, f"{name}_{i + 1}", seed, gamma)
        if i < last:
            branch = keras.layers.Activation("relu", name=f"{name}_{i + 1}_relu")(branch)
    if not is_plain:
        if shortcut == "projection_all" or (shortcut == "projection" and branch.shape != x.shape):
            x = conv_bn(x, filters, 1, stride, f"{name}_0", seed)  # W_s x
        elif branch.shape != x.shape:
            _require(filters >= x.shape[-1], "a projection where channels become fewer", shortcut)
            x = keras.ops.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))
        branch = keras.layers.Add(name=f"{name}_add")([x, branch])  # F(x) + x
    return keras.layers.Activation("relu", name=f"{name}_out")(branch)


def build_resnet_block(input_layer, block_num, num_units, kernel_sizes, channel_sizes, *, is_plain=False,
                       stride=None, shortcut="projection", stride_in="1x1", zero_gamma=False, seed=None):
    """Build one stage of the paper's Table 1 (conv2_x is `block_num` 2, ..., conv5_x is 5).

    Args:
        input_layer: Keras tensor of shape (batch, height, width, channels).
        block_num, num_units: The stage's number, which names its layers, and how many units it has.
        kernel_sizes, channel_sizes: One entry per convolution of a unit, such as (3, 3) and (64, 64), or
            (1, 3, 1) and (64, 64, 256) for a bottleneck.
        is_plain: Leave out the shortcuts and change nothing else.
        stride: Of the first unit; by default 1 in conv2_x and 2 after it.
        shortcut: Where the shape changes, "zero_pad" (option A of section 4.1, without parameters) or
            "projection" (B); "projection_all" projects in every unit (C).
        stride_in: A bottleneck's strided convolution, which the paper leaves open: the first "1x1" (the
            authors' released networks) or the "3x3" ("v1.5").
        zero_gamma: Start with F(x) = 0: the last batch norm's scale is 0 (Goyal et al. 2017).
        seed: Makes the initial weights reproducible, layer by layer.

    Returns:
        Keras tensor of shape (batch, ceil(height / stride), ceil(width / stride), channel_sizes[-1]).
    """
    _require(0 < len(kernel_sizes) == len(channel_sizes), "one entry per convolution of a unit",
             f"kernel_sizes {list(kernel_sizes)}, channel_sizes {list(channel_sizes)}")
    _require(num_units > 0, "a stage of at least 1 unit", f"num_units={num_units}")
    _require(not (is_plain and zero_gamma), "shortcuts, for zero_gamma", "is_plain=True")
    _require_one_of("shortcut", shortcut, SHORTCUTS)
    _require_one_of("stride_in", stride_in, ("1x1", "3x3"))
    stride = stride or (1 if block_num == 2 else 2)
    x = input_layer
    for unit in range(1, num_units + 1):
        x = build_unit(x, kernel_sizes, channel_sizes, stride if unit == 1 else 1,
                       f"conv{block_num}_block{unit}", is_plain=is_plain, shortcut=shortcut,
                       stride_in=stride_in, zero_gamma=zero_gamma, seed=seed)
    return x


def build_resnet(input_shape, units_per_block, channels, num_classes, *, bottleneck=False, is_plain=False,
                 stem="imagenet", seed=None, name=None, **options):
    """Build a whole network as in Table 1; it ends in logits, (batch, num_classes), not in probabilities.

    Args:
        input_shape: (height, width, channels), at least 32 pixels each way (8 with the "cifar" stem).
        units_per_block, channels: One entry per stage, such as [3, 4, 6, 3] and [64, 128, 256, 512].
        num_classes: At least 2.
        bottleneck: Units of 1x1, 3x3 and 1x1 (four times the channels) instead of two 3x3 (paper, Figure 5).
        is_plain: Leave out the shortcuts and change nothing else.
        stem: "imagenet" (7x7 stride 2 and max pool, Table 1) or "cifar" (3x3 stride 1, no pool, section 4.2).
        seed, options: See `build_resnet_block`.
    """
    least = SMALLEST[_require_one_of("stem", stem, SMALLEST)]
    _require(len(input_shape) == 3 and min(input_shape[:2]) >= least,
             f"input_shape (height, width, channels), at least {least} pixels each way", tuple(input_shape))
    _require(num_classes >= 2, "num_classes of at least 2", num_classes)
    _require(0 < len(units_per_block) == len(channels), "one entry per stage",
             f"units_per_block {list(units_per_block)}, channels {list(channels)}")
    image = keras.Input(input_shape, name="image")
    x = conv_bn(image, channels[0], *((7, 2) if stem == "imagenet" else (3, 1)), "conv1", seed)
    x = keras.layers.Activation("relu", name="conv1_relu")(x)
    if stem == "imagenet":
        x = keras.layers.ZeroPadding2D(1, name="pool1_pad")(x)  # zeros are harmless after a ReLU
        x = keras.layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for block_num, (num_units, width) in enumerate(zip(units_per_block, channels), start=2):
        unit = ((1, 3, 1), (width, width, 4 * width)) if bottleneck else ((3, 3), (width, width))
        x = build_resnet_block(x, block_num, num_units, *unit, is_plain=is_plain, seed=seed, **options)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    start = keras.initializers.HeNormal(seed)
    logits = keras.layers.Dense(num_classes, kernel_initializer=start, name="predictions")(x)
    return keras.Model(image, logits, name=name)


def create_model(name, input_shape=(32, 32, 3), num_classes=2, **options):
    """Build "resnet" or "plain" with a depth of Table 1 or section 4.2; `options` as in `build_resnet`."""
    plan = DEPTHS[MODELS[_require_one_of("model", name, MODELS)]] | {"is_plain": name.startswith("plain")}
    return build_resnet(input_shape, num_classes=num_classes, name=name, **plan | options)


def display_name(model):
    """ "resnet34" to "ResNet-34", "plain34" to "plain-34"."""
    return model.replace("resnet", "ResNet-").replace("plain", "plain-")


# ---- training ----


def make_config(model, profile=None, dataset="cats_vs_dogs", seed=0, **changes):
    """Return the configuration of a run, a dict of all that decides it; `changes` override single entries."""
    plan, is_plain = DEPTHS[MODELS[_require_one_of("model", model, MODELS)]], model.startswith("plain")
    profile = get_profile(profile)
    config = {
        "model": model, "dataset": dataset, "image_size": 32, "batch_size": 64, **PROFILES[profile],
        "optimizer": "adam", "learning_rate": 1e-3, "schedule": "half an epoch up, cosine down",
        "augmentation": "flips, 4-pixel shifts", "stem": plan["stem"], "stride_in": "1x1",
        "zero_gamma": False, "shortcut": "none" if is_plain else plan["shortcut"], "seed": seed,
        "profile": profile}
    if dataset == DIGITS:  # there are no more
        config |= {key: min(config[key], n) for key, n in (("train_images", 1_258), ("val_images", 539))}
    allowed = {key: [config[key]] for key in ("schedule", "augmentation")}  # they say what is always done
    allowed |= {"optimizer": OPTIMIZERS, "shortcut": ["none"] if is_plain else SHORTCUTS}
    for key, value in changes.items():
        _require_one_of("entry of a configuration", key, config)
        config[key] = _require_one_of(key, value, allowed.get(key, [value]))
    return json.loads(json.dumps(config, default=lambda number: number.item()))  # NumPy's numbers to Python's


def run_path(config, folder=None):
    """Where a run's file lies; its name has every entry that differs from the usual configuration."""
    usual = make_config(config["model"], config["profile"], config["dataset"], config["seed"])
    changed = "".join(f"-{key}_{config[key]}" for key in usual if config[key] != usual[key])
    folder = pathlib.Path(folder or RESULTS / config["profile"] / config["dataset"]).absolute()
    return folder / f"{config['model']}{changed}-seed{config['seed']}.json"


@keras.saving.register_keras_serializable("resnet_helpers")
class Adam(keras.optimizers.Adam):
    """Adam (Kingma and Ba 2015); with TensorFlow one pass over the weights, where Keras makes ten."""

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow":
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index, step = self._get_variable_index(variable), keras.ops.cast(self.iterations + 1, variable.dtype)
        m, v = (each[index].value.handle for each in (self._momentums, self._velocities))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=m, v=v, beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon,
            beta1_power=self.beta_1**step, beta2_power=self.beta_2**step, grad=gradient,
            lr=keras.ops.cast(learning_rate, variable.dtype))


OPTIMIZERS = {"adam": Adam, "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9)}


def learning_rate(config):
    """The schedule: half an epoch linearly up to config["learning_rate"], then along a cosine down to 0."""
    epoch = math.ceil(config["train_images"] / config["batch_size"])
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, config["epochs"] * epoch - epoch // 2), warmup_target=config["learning_rate"],
        warmup_steps=max(1, epoch // 2))


def build_from_config(config, num_classes):
    """The compiled network of a configuration."""
    options = {key: config[key] for key in ("stem", "stride_in", "zero_gamma", "seed")}
    if config["shortcut"] != "none":
        options["shortcut"] = config["shortcut"]
    model = create_model(config["model"], (config["image_size"],) * 2 + (3,), num_classes, **options)
    slow = keras.backend.backend() == "tensorflow" and _device().startswith("CPU")  # XLA is, there
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[config["optimizer"]](learning_rate(config)), loss, metrics=["accuracy"],
                  jit_compile=False if slow else "auto")
    return model


@functools.lru_cache
def _device():
    """Name of the device that trains, such as "CPU x86_64" or a GPU's name."""
    place, library = str(keras.ops.zeros(()).device).upper(), sys.modules[keras.backend.backend()]
    for kind in ("CPU", "MPS"):
        if kind in place:
            return f"{kind} {platform.machine()}"
    if library.__name__ == "tensorflow":
        gpu = library.config.list_physical_devices("GPU")[0]
        return library.config.experimental.get_device_details(gpu).get("device_name", "GPU")
    return library.devices()[0].device_kind if library.__name__ == "jax" else library.cuda.get_device_name()


def environment(data):
    """Versions, device, threads and the checksums of images and labels, as saved with a run."""
    backend = keras.backend.backend()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"python": platform.python_version(), "keras": keras.__version__, "backend": backend,
            backend: sys.modules[backend].__version__, "numpy": np.__version__, "device": _device(),
            "threads": int(os.environ.get("RESNET_THREADS") or cores), "date": time.strftime("%Y-%m-%d"),
            "images_crc32": zlib.crc32(data.val_images, zlib.crc32(data.train_images)),
            "labels_crc32": zlib.crc32(data.val_labels, zlib.crc32(data.train_labels))}


def train_run(config, folder=None, keep_weights=False, verbose=True):
    """Train one network in this process, or load its run if that is there, and return the run as a dict.

    Every finished epoch is saved: a run that was cut off goes on from there and ends in the same history.
    `keep_weights` also saves a new run's final weights beside its file, as <name>.weights.h5. Raises
    ValueError where files of this name belong to another run, RuntimeError where another process trains it.
    """
    path = run_path(config, folder)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        try:
            with filelock.FileLock(lock, timeout=10):  # a process told to end may hold it a moment longer
                if not path.exists():
                    _train(config, path, keep_weights, verbose)
            lock.unlink(missing_ok=True)
        except filelock.Timeout:
            raise RuntimeError(f"{path.stem} is being trained by another process, which holds {lock}. "
                               "Wait for it, stop it, or choose another folder.") from None
    run = read_run(path)
    _refuse_another(path, config, run["config"])
    return run


def _refuse_another(path, wanted, found):
    differ = [f"{key}: {found.get(key)!r}, wanted {value!r}" for key, value in wanted.items()
              if found.get(key) != value]
    if differ:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differ)}). It stays as it is: move it "
                         "away, or choose another folder.")


def _train(config, path, keep_weights, verbose):
    for left in path.parent.glob(f".*.{path.stem}.*"):  # by a kill in the middle of writing
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
        if not np.isfinite(logs["loss"] + logs["val_loss"]).all():
            run["status"] = "diverged"
        arrays = {str(i): keras.ops.convert_to_numpy(variable) for i, variable in enumerate(state)}
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
    """Put network and optimiser back to the last finished epoch, and return the run so far."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            saved = json.loads(str(file["run"]))
            values = [file[str(i)] for i in range(len(state))]
    except Exception as error:  # a damaged zip can raise nearly anything
        raise ValueError(f"{path} is damaged ({error!r}). Move it away to start afresh.") from error
    before, now = saved["environment"], run["environment"]
    _refuse_another(path, run["config"] | {key: now[key] for key in MACHINE}, saved["config"] | before)
    for variable, value in zip(state, values):
        variable.assign(value)
    if before != now | {"date": before["date"]}:  # such as other threads: the last digits may differ
        saved["earlier_environments"] = [*saved.get("earlier_environments", []), before]
    print(f"Going on after epoch {len(saved['history']['loss'])} of {saved['config']['epochs']}.", flush=True)
    return saved | {"environment": now}


def _epoch_line(table, i=-1):
    row = table.iloc[i]
    left = (row.epochs - row.epoch) * table.seconds.median() / 60
    return (f"{display_name(row.model)}, seed {row.seed}, epoch {row.epoch}/{row.epochs}: "
            f"loss {row.loss:.3f}, accuracy {row.accuracy:.1%}, validation {row.val_accuracy:.1%}, "
            f"{row.seconds:.0f} s, {left:.1f} min left{', DIVERGED' * (row.status == 'diverged')}")


def train_runs(configs, executor=None, folder=None, keep_weights=False):
    """Train each run in a process of its own, or load it if it is there; return all as `read_runs` does.

    Prints a line per finished epoch, and in Jupyter draws a figure that grows. When this call ends, so do its
    processes; their finished epochs are kept. `executor` is any `concurrent.futures.Executor`, such as
    ThreadPoolExecutor(2) for two runs side by side, or a cluster's; by default one run follows the other.
    """
    _require(len(configs) > 0, "configurations of at least 1 run", "none")
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
            # nothing but the standard library, so that any worker can run it
            jobs[path] = executor.submit(subprocess.run, command, capture_output=True, text=True)
            stack.callback(jobs[path].cancel)
        unfinished = list(jobs)
        while unfinished:  # looks at those alone, since reading files takes time from the training
            time.sleep(0.5)
            ended = [path for path in unfinished if jobs[path].done()]  # before the look: no epoch is missed
            for path in unfinished:
                known, tables[path] = len(tables[path]), _table_so_far(path, tables[path])
                for i in range(known, len(tables[path])):
                    number = f"[{list(paths).index(path) + 1}/{len(paths)}]"
                    print(number, _epoch_line(tables[path], i), flush=True)
                if len(tables[path]) > known and "ipykernel" in sys.modules:
                    from IPython.display import display

                    figure = plot_histories(pd.concat(tables.values(), ignore_index=True))
                    shown = shown or display(display_id=True)
                    shown.update(figure)
                    plt.close(figure)
            unfinished = [path for path in unfinished if path not in ended]
    for path, job in jobs.items():
        ended = job.result()
        print(ended.stdout, end="", flush=True)
        if ended.returncode:  # below 0: by a signal
            reason = ["Was it killed, or out of memory?", *ended.stderr.splitlines()][-(ended.returncode > 0)]
            raise RuntimeError(f"The run {path.stem} ended with status {ended.returncode}. {reason}")
    runs = [_run_table(train_run(config, folder), path) for path, config in paths.items()]
    return pd.concat(runs, ignore_index=True)


def _table_so_far(path, known):
    """The finished epochs of a run, from its files: the same wherever it trains; else those known."""
    with contextlib.suppress(Exception):  # not there yet, or just being replaced
        if path.exists():
            return _run_table(read_run(path), path)
        with open(path.with_suffix(".checkpoint.npz"), "rb") as opened, np.load(opened) as file:
            return _run_table(json.loads(str(file["run"])), path)
    return known


# ---- results ----

HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")  # one number per epoch each
MACHINE = ("backend", "device", "images_crc32", "labels_crc32")  # of the environment, all through a run
NETWORK = ["model", "shortcut", "zero_gamma"]  # what an ablation may vary; seeds repeat it


def read_run(path):
    """Read one run's file as a dict; options that are younger than the file have their usual values."""
    try:
        run = json.loads(pathlib.Path(path).read_text())
        history = {key: run["history"][key] for key in HISTORY}
        return run | {"config": make_config(**run["config"]), "history": history}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not a run's file ({error!r}). Move it away.") from error


def read_runs(folder):
    """Read all runs in a folder: a DataFrame with one row per epoch, its history beside the configuration.

    The column `variant` says what sets a run apart from the usual one: "", or such as "-learning_rate_0.003".
    """
    tables = [_run_table(read_run(path), path) for path in sorted(pathlib.Path(folder).glob("*.json"))]
    if not tables:
        raise FileNotFoundError(f"No runs in {folder}. Train them first (notebook 3).")
    return pd.concat(tables, ignore_index=True)


def _run_table(run, path):
    config, table = run["config"], pd.DataFrame(run["history"], dtype=float)
    variant = run_path(config).stem.removeprefix(config["model"]).removesuffix(f"-seed{config['seed']}")
    machine = {key: run["environment"].get(key, math.nan) for key in MACHINE}
    return table.assign(epoch=range(1, len(table) + 1), file=path.name, status=run["status"], variant=variant,
                        **config, **machine)


def ablation_table(runs, metric="val_accuracy", rates=None):
    """Plain against residual after equal epochs: a row per depth (and kind of shortcut), means over seeds.

    `rates`, a learning rate per model, picks each network's runs at its own rate; else all must have one.
    Columns: plain, residual, difference, seeds (those that both have); with several seeds also the standard
    deviations and the half width of the difference's 95% confidence interval, paired by seed. NaN: a run
    diverged. Runs that differ in anything but network and seed raise a ValueError.
    """
    if rates is not None:
        runs = runs[runs.learning_rate == runs.model.map(rates)].assign(learning_rate="own")
    for key in [*make_config("plain18"), *MACHINE]:
        files = runs.groupby(key).file.unique()  # leaves out files that are older than a checksum
        if len(files) > 1 and key not in [*NETWORK, "seed"]:
            groups = "; ".join(f"{value!r}: {', '.join(names)}" for value, names in files.items())
            raise ValueError(f"These runs cannot be compared: they differ in {key} ({groups}).")
    last, rows = runs.groupby("file").tail(1), {}
    last = last.assign(score=last[metric].where(last.status != "diverged"))
    arms = {arm: part.set_index("seed").score for arm, part in last.groupby(NETWORK)}
    for arm in sorted((arm for arm in arms if arm[1] != "none"), key=lambda arm: (MODELS[arm[0]], arm)):
        model, shortcut, zero_gamma = arm
        twin = (f"plain{MODELS[model]}", "none", False)
        _require(twin in arms, f"runs of {twin[0]} beside {model}", [arm[0] for arm in arms])
        pair = pd.concat({"plain": arms[twin], "residual": arms[arm]}, axis=1, join="inner")  # seeds of both
        pair["difference"] = pair.residual - pair.plain
        row = {**pair.mean(skipna=False), "seeds": len(pair)}
        if len(pair) > 1:
            row |= {f"{column} sd": sd for column, sd in pair.std(skipna=False).items()}
            interval = scipy.stats.ttest_rel(pair.residual, pair.plain).confidence_interval()
            row["95% half width"] = (interval.high - interval.low) / 2
        notes = [shortcut] * (shortcut != DEPTHS[MODELS[model]]["shortcut"]) + ["zero gamma"] * zero_gamma
        rows[f"{MODELS[model]} layers" + (f" ({', '.join(notes)})" if notes else "")] = row
    return pd.DataFrame.from_dict(rows, orient="index")


# ---- plots ----

# Hue is the kind, warm for plain and cool for residual; shade is the depth, in each of the two families.
COLOURS = {f"{kind}{depth}": colour for kind, palette in (("plain", "YlOrRd"), ("resnet", "YlGnBu"))
           for family in (list(DEPTHS)[:5], list(DEPTHS)[5:])
           for depth, colour in zip(family, sns.color_palette(palette, 8).as_hex()[3:])}
sns.set_theme(style="whitegrid", rc={
    "figure.dpi": 90, "savefig.dpi": 180, "savefig.facecolor": "white", "font.size": 11, "axes.labelsize": 11,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False})


def plot_histories(runs, heading="", metrics=("loss", "accuracy, %")):
    """Draw runs against epochs, a row per metric and a column per depth, a colour per network.

    Training is solid, validation dashed; with several seeds a line is their mean and a band their range.
    """
    keys = [part + metric for metric in ("loss", "accuracy") for part in ("", "val_")]
    long = runs.assign(network=runs.model.map(display_name), layers=runs.model.map(MODELS)).melt(
        ["network", "layers", "seed", "epoch"], keys, var_name="metric")
    long["part"] = np.where(long.metric.str.startswith("val_"), "validation", "training")
    long["metric"] = long.metric.str.removeprefix("val_").replace("accuracy", "accuracy, %")
    long.loc[long.metric != "loss", "value"] *= 100
    grid = sns.relplot(
        long, x="epoch", y="value", row="metric", row_order=metrics, col="layers", hue="network",
        style="part", palette={display_name(model): colour for model, colour in COLOURS.items()}, kind="line",
        errorbar=("pi", 100), marker="o", markersize=3, markeredgewidth=0, height=2.5, aspect=1.1,
        facet_kws={"sharey": "row", "margin_titles": True})
    grid.set_titles(col_template="{col_name} layers", row_template="").set_axis_labels("epoch")
    for metric, axis in zip(metrics, grid.axes[:, 0]):
        axis.set_ylabel(metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
    grid.figure.suptitle(heading, fontsize=12)
    grid.figure.subplots_adjust(top=0.83 if heading else 0.92)
    return grid.figure


if __name__ == "__main__":  # a configuration and options of train_run, both as JSON, and train_runs's lease
    config, options, lease = sys.argv[1:] + ["{}", ""][len(sys.argv) - 2 :]

    def end_with_parent():  # nothing trains on for nobody
        while os.path.exists(lease) and os.getppid() == PARENT:
            time.sleep(0.5)
        os._exit(1)

    if lease:
        threading.Thread(target=end_with_parent, daemon=True).start()
    train_run(make_config(**json.loads(config)), **json.loads(options))
