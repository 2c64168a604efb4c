"""Plain and residual networks for small pictures: the one helper module behind the notebooks.

"The paper" is He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
A run is one network, trained by `train_run` and kept as one JSON file.
"""

import base64
import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib

# Read when a backend is loaded: fast convolutions, few messages, GPU memory as needed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX

import filelock
import joblib
import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import requests
import scipy.stats
import seaborn as sns
from keras import layers, ops
from PIL import Image, ImageOps

# ---- settings and files ----

PROFILES = {
    "full": {"train_images": 16_283, "val_images": 6_979, "epochs": 15},
    "quick": {"train_images": 1_280, "val_images": 512, "epochs": 4, "batch_size": 32},
    "test": {"train_images": 96, "val_images": 48, "epochs": 2},
}


def _folder(variable, default):
    return pathlib.Path(os.environ.get(variable) or default).expanduser().absolute()


COMMITTED = pathlib.Path(__file__).resolve().parent / "results"
RESULTS = _folder("RESNET_RESULTS", COMMITTED)


def get_profile(name=None):
    """Return `name`, else the environment variable RESNET_PROFILE, else "full"."""
    name = name or os.environ.get("RESNET_PROFILE") or "full"
    return _require_one_of("profile", name, PROFILES)


def get_dataset(name=None):
    """Return `name`, else the environment variable RESNET_DATASET, else "cats_vs_dogs".

    That is a name that TensorFlow Datasets knows (an image and a label), or the absolute path of a
    folder with a subfolder of pictures for each class.
    """
    name = os.path.expanduser(name or os.environ.get("RESNET_DATASET") or "cats_vs_dogs")
    return os.path.normpath(name) if os.path.isabs(name) else name


def results_folder(profile=None, dataset=None):
    """Where the runs of a profile on a data set lie."""
    return RESULTS / get_profile(profile) / _short_name(get_dataset(dataset))


def _short_name(dataset):
    """A data set's name within file names; for a folder with a checksum of its path."""
    if os.path.isabs(dataset):
        return f"{pathlib.Path(dataset).name}-{zlib.crc32(os.fsencode(dataset)):08x}"
    return dataset.replace("/", "-")


def _require(condition, needed, received):
    if not condition:
        raise ValueError(f"Needed: {needed}. Received: {received}.")


def _require_one_of(what, received, allowed):
    _require(received in allowed, f"{what} out of {', '.join(map(str, allowed))}", repr(received))
    return received


_writing = threading.Lock()  # no process ends in the middle of a file: see `_start_process`


def write_atomically(path, write):
    """Call `write(partial_path)` so that `path` ends up whole or untouched, whatever happens."""
    partial = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writing:
            write(partial)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            _replace(partial, path)
    except OSError as error:
        raise type(error)(
            f"Cannot write {path} ({error}). What was saved before is safe. Make room, or set "
            "RESNET_RESULTS or RESNET_DATA to another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # there only if something went wrong


def _replace(partial, path):
    """Windows refuses it while somebody reads the file at `path`: try for a second."""
    for _ in range(10):
        try:
            return os.replace(partial, path)
        except PermissionError:
            time.sleep(0.1)
    os.replace(partial, path)


def _read_arrays(path, names=None):
    """The arrays of these names, or all, in a file of np.savez; a damaged file is named."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:  # np.load(path) may leave it open
            return [file[name] for name in names or file.files]
    except (MemoryError, PermissionError, FileNotFoundError):  # not the file's fault
        raise
    except Exception as error:  # a damaged zip can raise anything
        raise ValueError(f"{path} is damaged or another file ({error!r}). Move it away.") from error


# ---- data ----

DIGITS = "sklearn_digits"  # handwritten, 1,797 of 8x8 pixels: they need no network
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# The classes' names; of both splits the images, uint8 (n, size, size, 3), and the labels, (n,).
Data = collections.namedtuple(
    "Data", "class_names train_images train_labels val_images val_labels")


def data_dir():
    """The folder of the prepared data sets: TFDS_DATA_DIR, else TFDS's own default."""
    return _folder("TFDS_DATA_DIR", "~/tensorflow_datasets")


def prepare_dataset(profile=None, name=None, image_size=32):
    """Bring a data set (see `get_dataset`) to this machine, and return its name.

    TensorFlow Datasets downloads what is not there (cats_vs_dogs: 787 MB). Without a network, all
    profiles but "full" fall back to handwritten digits, unless a data set was asked for. Other
    failures raise RuntimeError, names that nobody knows ValueError.
    """
    asked_for = name or os.environ.get("RESNET_DATASET")
    name = get_dataset(name)
    if _decoded_path(name, image_size):
        return name
    import tensorflow_datasets as tfds
    known = [DIGITS, *tfds.list_builders(with_community_datasets=False)]
    _require(name.split("/")[0] in known, "a data set that TensorFlow Datasets knows, or the "
             "absolute path of a folder with a subfolder of pictures for each class", repr(name))
    try:
        with filelock.FileLock(data_dir() / f"{_short_name(name)}.lock"):  # two may start at once
            _download(name)
        return name
    except ValueError:
        raise
    except Exception as error:
        offline = isinstance(error, requests.exceptions.RequestException)
        if asked_for or get_profile(profile) == "full" or not offline:
            raise RuntimeError(
                f"Preparing {name} in {data_dir()} failed ({error!s:.99}). Without a network set "
                "TFDS_DATA_DIR to a folder with it, or RESNET_PROFILE=quick alone.") from error
        print(f"!!! NO CATS, NO DOGS ({error!s:.99}). Handwritten digits ({DIGITS}) instead.")
        return prepare_dataset(profile, DIGITS, image_size)


def _download(name):
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits
    from tensorflow_datasets.image_classification import cats_vs_dogs

    if name != DIGITS:
        # Without a network TFDS would try for minutes.
        url = cats_vs_dogs._URL if name == "cats_vs_dogs" else "https://www.tensorflow.org"
        requests.head(url, timeout=10, allow_redirects=True).raise_for_status()
        builder = tfds.builder(name, data_dir=data_dir())
        _require("/" in name or not builder.builder_config,
                 f"one of {', '.join(f'{name}/{each}' for each in builder.builder_configs)}", name)
        return builder.download_and_prepare()
    digits = load_digits()
    images = (digits.images * 255 / 16).astype("uint8")[..., None]
    examples = [{"image": image, "label": label} for image, label in zip(images, digits.target)]
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 1)),
                                           "label": tfds.features.ClassLabel(num_classes=10)})
    tfds.dataset_builders.store_as_tfds_dataset(
        DIGITS, "1.0.0", features, {"train": enumerate(examples)}, data_dir=data_dir())


def load_data(name=None, image_size=32):
    """Return both splits (70% and 30%) of a data set as `Data`, resized.

    Decoded once per machine, into the folder RESNET_DATA (default ~/.cache/resnet_helpers), they
    need neither the prepared data set nor TensorFlow.
    """
    name = get_dataset(name)
    path = _decoded_path(name, image_size)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not on this machine. prepare_dataset(name={name!r}, "
            f"image_size={image_size}) fetches what TensorFlow Datasets knows, into {data_dir()}.")
    if not path.exists():
        with filelock.FileLock(f"{path}.lock"):  # two may start at once
            if not path.exists():
                print(f"Decoding {name} to {image_size}x{image_size} pixels, once per machine ...",
                      flush=True)
                decode = _decode_folder if os.path.isabs(name) else _decode_tfds
                data = decode(name, image_size)
                write_atomically(path, lambda partial: np.savez(partial, **data._asdict()))
    return Data(*_read_arrays(path, Data._fields))


def _decoded_path(name, image_size):
    """Path of the file of decoded images; None if there is neither one nor the data set."""
    folder = _folder("RESNET_DATA", "~/.cache/resnet_helpers")
    stem = f"{_short_name(name)}-{image_size}px-"
    if os.path.isabs(name):
        found = pictures(name) if os.path.isdir(name) else []
        state = os.fsencode("".join(f"{file}{file.stat().st_mtime_ns}" for file in found))
    else:
        found = sorted((data_dir() / name).glob("[0-9]*/dataset_info.json"))
        state = b"".join(file.read_bytes() for file in found)
    if not found:
        there = [path for path in folder.glob("*.npz") if path.name.startswith(stem)]
        return max(there, key=os.path.getmtime, default=None)
    return folder / f"{stem}{zlib.crc32(state):08x}.npz"  # another one for a changed set


def _decode_tfds(name, image_size):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def decode(example):
        image = tf.image.resize(example["image"], [image_size, image_size], antialias=True)
        image = tf.saturate_cast(tf.round(image), tf.uint8)
        return tf.broadcast_to(image, [image_size, image_size, 3]), example["label"]

    builder = tfds.builder(name, data_dir=data_dir())
    features = builder.info.features
    splits = builder.info.splits
    classes = getattr(dict(features).get("label"), "names", None)
    _require("image" in features and classes and "train" in splits,
             f"images, labels of classes and a split 'train' in {name}",
             f"{', '.join(features)} in {', '.join(splits)}")
    image = features["image"]
    _require(image.np_dtype == np.uint8 and image.shape[-1] in (1, 3), "8 bits, gray or RGB", image)
    options = tf.data.Options()
    options.autotune.enabled = False  # it holds up the end of a pass by up to a minute
    arrays = []
    for split in ("train[:70%]", "train[70%:]"):  # in a fixed order
        batches = builder.as_dataset(split=split).map(decode, joblib.cpu_count()).batch(512)
        images, labels = zip(*batches.with_options(options).as_numpy_iterator())
        arrays += [np.concatenate(images), np.concatenate(labels)]
    return Data(np.array(classes), *arrays)


def pictures(folder):
    """The pictures in a folder, which has a subfolder for each class, in an order mixed once."""
    classes = [path for path in pathlib.Path(folder).glob("[!.]*") if path.is_dir()]
    found = {}
    for path in sorted(classes, key=os.fspath):  # as text: Windows sorts paths in another order
        files = [file for file in path.glob("[!.]*") if file.suffix.lower() in PICTURES]
        found[path.name] = sorted(files, key=os.fspath)
    _require(len(found) >= 2 and all(found.values()),
             f"at least two subfolders of {folder}, each with pictures ({', '.join(PICTURES)}) of "
             "one class", {name: f"{len(files)} pictures" for name, files in found.items()})
    files = [file for each in found.values() for file in each]
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


def read_picture(file):
    """A picture of a folder as a PIL image in RGB: upright, on white where it is transparent."""
    try:
        with Image.open(file) as picture:
            _require(picture.mode[0] not in "IF", "8 bits per colour", picture.mode)
            picture = ImageOps.exif_transpose(picture).convert("RGBA")  # cameras note a turn
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
    except Exception as error:  # a broken picture can raise anything
        raise ValueError(f"{file} is no picture ({error}). Mend or remove it.") from error


def _decode_folder(folder, image_size):
    files = pictures(folder)
    images = np.empty((len(files), image_size, image_size, 3), "uint8")
    for i, file in enumerate(files):
        images[i] = read_picture(file).resize((image_size,) * 2, Image.Resampling.BILINEAR)
    classes, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    n = 7 * len(files) // 10
    return Data(classes, images[:n], labels[:n], images[n:], labels[n:])


def normalize(images):
    """uint8 (0 to 255) to float32 (0 to 1), any shape."""
    return images.astype("float32") / 255


def augment(images, rng):
    """Flip images with probability 1/2, shift them by up to 4 pixels (paper, section 4.2)."""
    count, height, width, _ = images.shape
    flips = rng.random(count) < 0.5
    down, right = rng.integers(0, 9, (2, count))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    changed = np.empty_like(images)
    for i in range(count):
        changed[i] = padded[i, down[i] : down[i] + height, right[i] : right[i] + width]
        if flips[i]:
            changed[i] = changed[i, :, ::-1]
    return changed


class Batches(keras.utils.PyDataset):
    """Batches of float32 images in 0 to 1, (batch, size, size, 3), and of int labels, (batch,).

    Each image comes once. For training, `seed_and_epoch` alone decides order and augmentation, so
    that a run can go on exactly.
    """

    def __init__(self, images, labels, batch_size=64, seed_and_epoch=None):
        super().__init__(workers=2)  # without workers, tf.data's autotuning holds up each epoch
        _require(0 < len(images) == len(labels),
                 "a label per image", f"{len(labels)} for {len(images)}")
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed_and_epoch = seed_and_epoch
        self.order = np.arange(len(images))
        if self.seed_and_epoch:
            self.order = np.random.default_rng(self.seed_and_epoch).permutation(self.order)

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.images[rows]
        if self.seed_and_epoch:
            images = augment(images, np.random.default_rng([*self.seed_and_epoch, index]))
        return normalize(images), self.labels[rows]


# ---- models ----

SHORTCUTS = ("zero_pad", "projection", "projection_all")  # options A, B, C of section 4.1
STRIDES_IN = ("1x1", "3x3")
STEMS = {"imagenet": (7, 2, 32), "cifar": (3, 1, 8)}  # kernel size, stride, smallest image
UNITS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3],
         152: [3, 8, 36, 3]}  # Table 1
DEPTHS = {depth: {"units_per_block": units, "channels": [64, 128, 256, 512],
                  "bottleneck": depth >= 50, "stem": "imagenet", "shortcut": "projection"}
          for depth, units in UNITS.items()}
DEPTHS |= {6 * n + 2: {"units_per_block": [n, n, n], "channels": [16, 32, 64],
                       "bottleneck": False, "stem": "cifar", "shortcut": "zero_pad"}
           for n in (3, 5, 7, 9, 18)}  # section 4.2: 6n + 2 layers
MODELS = {f"{kind}{depth}": depth for depth in DEPTHS for kind in ("plain", "resnet")}


@keras.saving.register_keras_serializable("resnet_helpers")
class Conv2D(layers.Conv2D):
    """A convolution that pads alike on all sides (Keras's "same" does so only at stride 1).

    For square kernels of odd size, equal strides and channels last. Where images are small it is
    a product of matrices: the same to rounding, faster, without the weights that see only padding.
    """

    def convolution_op(self, inputs, kernel):
        if self.padding != "same" or self.dilation_rate != (1, 1) or self.groups > 1:
            return super().convolution_op(inputs, kernel)
        stride = self.strides[0]
        pad = self.kernel_size[0] // 2
        size = max(inputs.shape[1:3])
        if pad == 0 and size <= 4 * stride:  # larger ones are faster as convolutions
            inputs = inputs[:, ::stride, ::stride]
            return self._product(inputs, ops.reshape(kernel, (-1, self.filters)), inputs.shape[1:3])
        if size <= max(stride, pad + 1):  # every output pixel sees the whole image, or is alone
            ys = range(0, inputs.shape[1], stride)
            xs = range(0, inputs.shape[2], stride)
            inputs = inputs[:, : pad + 1, : pad + 1]
            parts = [self._seen(inputs, kernel, pad - y, pad - x) for y in ys for x in xs]
            return self._product(inputs, ops.concatenate(parts, axis=1), (len(ys), len(xs)))
        if stride == 1:
            return super().convolution_op(inputs, kernel)
        if pad:
            inputs = ops.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        return ops.conv(inputs, kernel, stride, "valid", data_format="channels_last")

    def _seen(self, inputs, kernel, top, left):
        """The weights of one output pixel: a matrix from all inputs to all filters."""
        kernel = ops.convert_to_tensor(kernel)  # JAX slices no Keras variable
        # The gradient of a slice is cheaper than that of an index.
        part = ops.slice(kernel, (top, left, 0, 0), (*inputs.shape[1:], self.filters))
        return ops.reshape(part, (-1, self.filters))

    def _product(self, inputs, matrix, size):
        product = ops.matmul(ops.reshape(inputs, (-1, matrix.shape[0])), matrix)
        return ops.reshape(product, (-1, *size, self.filters))


@keras.saving.register_keras_serializable("resnet_helpers")
class BatchNormalization(layers.BatchNormalization):
    """Batch norm over the channels of (batch, height, width, channels).

    Training on TensorFlow uses its fused operation: Keras's ten, to rounding, but faster.
    """

    def call(self, inputs, training=None, mask=None):
        fused = keras.backend.backend() == "tensorflow" and self.compute_dtype != "float64"
        usual = self.axis in (-1, 3) and len(inputs.shape) == 4 and self.center and self.scale
        if not (fused and usual and training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon)
        count = ops.cast(tf.size(inputs) / inputs.shape[-1], variance.dtype)
        variance = variance * (count - 1) / count  # TensorFlow's is unbiased, Keras's is not
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + now * (1 - self.momentum))
        return outputs


def mirror(kernel):
    """The mirrored form of a convolution's initial weights ("looks linear", Balduzzi et al. 2017).

    Over halves of its input and output channels it is [[V, -V], [-V, V]], V being the first part
    of `kernel`, so that its weights keep their variance (for images, whose three channels have no
    halves: [V, -V]). The layer puts out [Vu; -Vu], and since relu(u) - relu(-u) = u, the next one
    sees Vu as if there were no ReLU.
    """
    shape = tuple(kernel.shape)
    _require(shape[-1] % 2 == 0, "even numbers of channels, for mirrored", shape)
    halved = (-2, -1) if shape[-2] % 2 == 0 else (-1,)
    for axis in halved:
        half = ops.split(kernel, 2, axis)[0]
        kernel = ops.concatenate([half, -half], axis)
    return kernel


def conv_bn(x, filters, kernel_size, stride, name, seed=None, gamma="ones"):
    """Convolution without bias (its batch norm has one) from He's start (2015b), batch norm."""
    if seed is not None:  # by name, so that twins start from the same weights
        seed = zlib.crc32(f"{seed} {name}".encode())
    x = Conv2D(filters, kernel_size, strides=stride, padding="same", use_bias=False,
               kernel_initializer=keras.initializers.HeNormal(seed), name=f"{name}_conv")(x)
    return BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=f"{name}_bn")(x)


def build_unit(x, kernel_sizes, channel_sizes, stride, name, *, is_plain=False,
               shortcut="projection", stride_in="1x1", zero_gamma=False, shortcut_scale=1.0,
               seed=None):
    """One unit: y = relu(F(x) + x), or relu(F(x) + W_s x) (paper, equations 1 and 2).

    Args:
        x: Keras tensor, (batch, height, width, channels).
        kernel_sizes, channel_sizes: Such as (3, 3) and (64, 64), or (1, 3, 1) and (64, 64, 256).
        name: What the names of its layers begin with.
        is_plain: Leave the shortcut out and change nothing else: y = relu(F(x)).
        shortcut: Where the shape changes, "zero_pad" (option A of section 4.1) or "projection"
            (B); "projection_all" projects in every unit (C).
        stride_in: Where a bottleneck strides, which the paper leaves open: in its first "1x1", as
            in the authors' released networks, or in its "3x3" ("v1.5").
        zero_gamma: Start with F(x) = 0: the last batch norm's scale is 0 (Goyal et al. 2017).
        shortcut_scale: a in y = relu(F(x) + a x): 1 in the paper.
        seed: Makes the initial weights reproducible.
    """
    _require(0 < len(kernel_sizes) == len(channel_sizes),
             "equal lengths > 0", (kernel_sizes, channel_sizes))
    _require(not is_plain or (shortcut_scale == 1 and not zero_gamma),
             "shortcuts, for zero_gamma and shortcut_scale", "is_plain=True")
    _require_one_of("shortcut", shortcut, SHORTCUTS)
    _require_one_of("stride_in", stride_in, STRIDES_IN)
    strided = 0
    if stride_in == "3x3" and 3 in kernel_sizes:
        strided = list(kernel_sizes).index(3)
    last = len(kernel_sizes) - 1
    branch = x  # becomes F(x), the residual branch
    for i, (kernel_size, channels) in enumerate(zip(kernel_sizes, channel_sizes)):
        branch = conv_bn(branch, channels, kernel_size, stride if i == strided else 1,
                         f"{name}_{i + 1}", seed,
                         gamma="zeros" if zero_gamma and i == last else "ones")
        if i < last:
            branch = layers.Activation("relu", name=f"{name}_{i + 1}_relu")(branch)
    if not is_plain:
        x = _shortcut(x, branch, shortcut, stride, name, seed)
        if shortcut_scale != 1:
            x = layers.Rescaling(shortcut_scale, name=f"{name}_scale")(x)  # a x
        branch = layers.Add(name=f"{name}_add")([x, branch])  # F(x) + x
    return layers.Activation("relu", name=f"{name}_out")(branch)


def _shortcut(x, branch, shortcut, stride, name, seed):
    """x, or W_s x, in the shape of the residual branch."""
    if branch.shape == x.shape and shortcut != "projection_all":
        return x
    if shortcut != "zero_pad":
        return conv_bn(x, branch.shape[-1], 1, stride, f"{name}_0", seed)
    missing = branch.shape[-1] - x.shape[-1]
    _require(missing >= 0, "a projection where channels become fewer", shortcut)
    return ops.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, missing)))


def build_resnet_block(input_layer, block_num, num_units, kernel_sizes, channel_sizes, *,
                       stride=None, **options):
    """Build one stage of the paper's Table 1: `block_num` 2 is conv2_x, ..., 5 is conv5_x.

    `stride`, by which the first unit divides height and width, is 1 in conv2_x and else 2 by
    default. The rest and `options` are those of `build_unit`.
    """
    _require(num_units > 0, "num_units of at least 1", num_units)
    x = input_layer
    stride = stride or (1 if block_num == 2 else 2)
    for unit in range(1, num_units + 1):
        name = f"conv{block_num}_block{unit}"
        x = build_unit(x, kernel_sizes, channel_sizes, stride, name, **options)
        stride = 1
    return x


def build_resnet(input_shape, units_per_block, channels, num_classes, *, bottleneck=False,
                 stem="imagenet", mirrored=0.0, seed=None, name=None, **options):
    """Build a whole network as in Table 1; it ends in logits, (batch, num_classes).

    Args:
        input_shape: (height, width, channels), at least 32 pixels each way (8 with "cifar").
        units_per_block, channels: Of each stage, such as [3, 4, 6, 3] and [64, 128, 256, 512].
        bottleneck: Units of 1x1, 3x3 and 1x1 (four times the channels), not two 3x3 (Figure 5).
        stem: "imagenet" (7x7 stride 2 and max pool, Table 1) or "cifar" (3x3, section 4.2).
        mirrored: From 0, He's start, to 1, a plain network that starts linear (a max pool aside).
        seed, options: `is_plain` and the others of `build_unit`.
    """
    axes = keras.config.image_data_format()
    _require(axes == "channels_last", "image_data_format channels_last in keras.json", axes)
    kernel_size, stride, least = STEMS[_require_one_of("stem", stem, STEMS)]
    _require(len(input_shape) == 3 and min(input_shape[:2]) >= least,
             f"input_shape (height, width, channels), at least {least} pixels each way",
             tuple(input_shape))
    _require(num_classes >= 2, "num_classes of at least 2", num_classes)
    _require(0 <= mirrored <= 1, "mirrored from 0 to 1", mirrored)
    _require(0 < len(units_per_block) == len(channels),
             "equal lengths > 0", (units_per_block, channels))
    image = keras.Input(input_shape, name="image")
    x = conv_bn(image, channels[0], kernel_size, stride, "conv1", seed)
    x = layers.Activation("relu", name="conv1_relu")(x)
    if stem == "imagenet":
        x = layers.ZeroPadding2D(1, name="pool1_pad")(x)  # after a ReLU no 0 exceeds a maximum
        x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for block_num, (num_units, width) in enumerate(zip(units_per_block, channels), start=2):
        kernel_sizes = (1, 3, 1) if bottleneck else (3, 3)
        channel_sizes = (width, width, 4 * width) if bottleneck else (width, width)
        x = build_resnet_block(x, block_num, num_units, kernel_sizes, channel_sizes, seed=seed,
                               **options)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    start = keras.initializers.HeNormal(seed)
    logits = layers.Dense(num_classes, kernel_initializer=start, name="predictions")(x)
    model = keras.Model(image, logits, name=name)
    for layer in model.layers:
        if mirrored and isinstance(layer, Conv2D):
            he = layer.kernel.value
            layer.kernel.assign(mirrored * mirror(he) + (1 - mirrored) * he)
    return model


def create_model(name, input_shape=(32, 32, 3), num_classes=2, **options):
    """Build "resnet" or "plain" with a depth of Table 1 or section 4.2, such as "resnet34".

    `options` are those of `build_resnet`.
    """
    depth = MODELS[_require_one_of("model", name, MODELS)]
    settings = DEPTHS[depth] | {"is_plain": name.startswith("plain")} | options
    return build_resnet(input_shape, num_classes=num_classes, name=name, **settings)


def display_name(model):
    """The name for readers: "ResNet-34" for "resnet34", "plain-34" for "plain34"."""
    return model.replace("resnet", "ResNet-").replace("plain", "plain-")


# ---- training ----

SIZES = {"cats_vs_dogs": (16_283, 6_979)}  # of both splits; others are counted when needed
CHOICES = {
    "optimizer": ("adam", "sgd"), "stem": STEMS, "stride_in": STRIDES_IN, "shortcut": SHORTCUTS,
    "zero_gamma": (False, True),
    "schedule": ("half an epoch up, cosine down",), "augmentation": ("flips, 4-pixel shifts",)}
NO_SHORTCUTS = {"shortcut": ("none",), "zero_gamma": (False,), "shortcut_scale": (1.0,)}
HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")  # one number per epoch each
MACHINE = ("backend", "device", "images_crc32", "labels_crc32")  # what stays through a run
NEWER = {"zero_gamma": False, "mirrored": 0.0, "shortcut_scale": 1.0}  # the oldest runs lack these
# Networks that are compared may differ in NETWORK and in the learning rate, but not in RECIPE.
NETWORK = ["model", "stem", "stride_in", "shortcut", "zero_gamma", "mirrored", "shortcut_scale"]
RECIPE = ["dataset", "image_size", "batch_size", "train_images", "val_images", "epochs",
          "optimizer", "schedule", "augmentation", *MACHINE]


def make_config(model, profile=None, dataset=None, seed=0, **changes):
    """Return a run's configuration, a dict of all that decides it; `changes` override entries.

    A profile takes no more images than a data set has; "full" takes all.
    """
    profile, dataset = get_profile(profile), get_dataset(dataset)
    design = DEPTHS[MODELS[_require_one_of("model", model, MODELS)]]
    is_plain = model.startswith("plain")
    config = {
        "model": model, "dataset": dataset, "image_size": 32, "batch_size": 64,
        **PROFILES[profile], "optimizer": "adam", "learning_rate": 0.001,
        "schedule": CHOICES["schedule"][0], "augmentation": CHOICES["augmentation"][0],
        "stem": design["stem"], "stride_in": "1x1", **NEWER,
        "shortcut": "none" if is_plain else design["shortcut"], "seed": 0, "profile": profile}
    choices = CHOICES | NO_SHORTCUTS if is_plain else CHOICES
    for key, value in {"seed": seed, **changes}.items():
        _require_one_of("entry of a configuration", key, config)
        config[key] = _checked(key, value, config[key], choices.get(key))
    least = STEMS[config["stem"]][2]
    _require(config["image_size"] >= least, f"image_size from {least}", config["image_size"])
    if dataset not in SIZES:
        data = load_data(dataset, config["image_size"])
        SIZES[dataset] = len(data.train_images), len(data.val_images)
    for key, n in zip(("train_images", "val_images"), SIZES[dataset]):
        if key not in changes:
            config[key] = n if profile == "full" else min(n, config[key])
        _require(config[key] <= n, f"{key} up to {n}", config[key])
    return config


def _checked(key, value, usual, choices):
    """An entry of a configuration, in the usual type: one of its choices, or a number."""
    kind = type(usual)
    if choices:
        return kind(_require_one_of(key, value, choices))
    least = {"seed": 0, "mirrored": 0, "shortcut_scale": 0, "learning_rate": 1e-9}.get(key, 1)
    most = {"mirrored": 1, "seed": 2**32 - 1}.get(key, math.inf)
    try:
        number = kind(str(value))  # as text: np.float32(0.003) is 0.003000000026...
    except ValueError:
        number = math.nan
    _require(least <= number <= most and math.isfinite(number) and not isinstance(value, str),
             f"{key}, {kind.__name__} from {least} to {most}", repr(value))
    return number


def run_path(config, folder=None):
    """Where a run's file lies; its name has every entry that is not the usual one."""
    profile, dataset = config["profile"], config["dataset"]
    # On the same images, since others may have to be counted; the stem allows their size.
    own = {key: config[key] for key in ("seed", "image_size", "stem")}
    usual = make_config(config["model"], profile, dataset, **own)
    usual |= {"image_size": 32, "stem": DEPTHS[MODELS[config["model"]]]["stem"]}
    changed = [f"{key}_{config[key]}" for key in usual if config[key] != usual[key]]
    parts = [config["model"], _short_name(dataset), profile, *changed, f"seed{config['seed']}"]
    name = "-".join(part for part in parts if part not in ("cats_vs_dogs", "full"))
    folder = pathlib.Path(folder or results_folder(profile, dataset)).absolute()
    return folder / f"{name}.json"


@keras.saving.register_keras_serializable("resnet_helpers")
class Adam(keras.optimizers.Adam):
    """Adam (Kingma and Ba 2015); with TensorFlow in one pass over the weights, not Keras's ten."""

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle, beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step, lr=ops.cast(learning_rate, variable.dtype),
            beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon, grad=gradient)


def learning_rate(config):
    """The schedule: for half an epoch up to config["learning_rate"], then a cosine down to 0."""
    steps = math.ceil(config["train_images"] / config["batch_size"])  # in an epoch
    up = max(1, steps // 2)
    down = max(1, config["epochs"] * steps - up)
    return keras.optimizers.schedules.CosineDecay(
        0.0, down, warmup_target=config["learning_rate"], warmup_steps=up)


def build_from_config(config, num_classes):
    """The compiled network of a configuration."""
    options = {key: config[key] for key in (*NETWORK[1:], "seed") if config[key] != "none"}
    size = config["image_size"]
    model = create_model(config["model"], (size, size, 3), num_classes, **options)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    adam = Adam if on_tensorflow else keras.optimizers.Adam  # on PyTorch the faster one
    if config["optimizer"] == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate(config), momentum=0.9)
    else:
        optimizer = adam(learning_rate(config))
    slow = on_tensorflow and _device().startswith("CPU")  # for XLA
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                  metrics=["accuracy"], jit_compile=False if slow else "auto")
    # Metrics made in the first step would have TensorFlow trace it twice.
    model.compute_metrics(None, np.zeros(1), np.zeros((1, num_classes)))
    model.optimizer.build(model.trainable_variables)  # a checkpoint may be put into it
    return model


def _device():
    """Such as "CPU x86_64" or "NVIDIA H200"."""
    backend = keras.backend.backend()
    name = str(ops.zeros(()).device)
    if "CPU" in name.upper():
        return f"CPU {platform.machine()}"
    module = sys.modules[backend]
    if backend == "jax":
        return module.devices()[0].device_kind
    if backend == "torch":
        return module.cuda.get_device_name() if "cuda" in name else name
    gpu = module.config.list_physical_devices("GPU")[0]
    return module.config.experimental.get_device_details(gpu)["device_name"]


def environment(data):
    """What is saved with a run: versions, device, threads, start, checksums of the images."""
    backend = keras.backend.backend()
    share = os.environ.get("TF_NUM_INTRAOP_THREADS") if backend == "tensorflow" else None
    # Through a shell: a missing git is no error.
    commit = subprocess.run("git rev-parse --verify HEAD", shell=True, capture_output=True,
                            text=True, cwd=COMMITTED.parent).stdout.strip()
    return {
        "python": platform.python_version(), "keras": keras.__version__, "backend": backend,
        backend: sys.modules[backend].__version__, "numpy": np.__version__, "device": _device(),
        "threads": int(share or joblib.cpu_count()),
        "commit": commit or None, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "classes": len(data.class_names),
        "images_crc32": zlib.crc32(data.val_images, zlib.crc32(data.train_images)),
        "labels_crc32": zlib.crc32(data.val_labels, zlib.crc32(data.train_labels))}


def train_run(config, folder=None, keep_weights=False, verbose=True):
    """Train one network in this process, or load its run if that is there; return it as a dict.

    Every finished epoch is saved: a run that was cut off goes on from there, to the same history.
    `keep_weights` also saves the final weights, as <name>.weights.h5. Raises ValueError where
    files of this name belong to another run, RuntimeError where another process trains it.
    """
    path = run_path(config, folder)
    lock = path.with_suffix(".lock")
    if not path.exists():
        try:
            with filelock.FileLock(lock, timeout=10):  # an ending process may still hold it
                if not path.exists():
                    _train(config, path, keep_weights, verbose)
            with contextlib.suppress(OSError):  # Windows: another process waits for it
                lock.unlink()
        except filelock.Timeout:
            raise RuntimeError(
                f"Another process trains {path.stem} ({lock}). Wait, or stop it.") from None
    return _check_saved(path, config, keep_weights)


def _saved_run(path):
    """A run as far as it is saved, as a dict; None if there is nothing yet."""
    if path.exists():
        return read_run(path)
    if _checkpoint(path).exists():
        text = str(_read_arrays(_checkpoint(path), ["run"])[0])
        return _parse_run(text, _checkpoint(path), ("training", "diverged"))


def _check_saved(path, config, keep_weights):
    """`_saved_run`; raises ValueError if what is saved is damaged, or another run."""
    run = _saved_run(path)
    if run:
        _refuse_another(path, config, run["config"])
    if path.exists():
        weights = path.with_suffix(".weights.h5")
        _require(weights.exists() or not keep_weights,
                 f"{weights.name} beside the finished run; move that away to train it again", path)
    elif run:
        _read_arrays(_checkpoint(path))  # all of it, to see whether it is whole
    return run


def _checkpoint(path):
    return path.with_suffix(".checkpoint.npz")


def _refuse_another(path, wanted, found):
    differ = [f"{key}: {found.get(key)!r}, wanted {value!r}" for key, value in wanted.items()
              if found.get(key) != value]
    if differ:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differ)}). Move it away.")


def _train(config, path, keep_weights, verbose):
    """Prepare, train epoch by epoch, finish."""
    data = load_data(config["dataset"], config["image_size"])
    n, m = config["train_images"], config["val_images"]
    most = len(data.train_images), len(data.val_images)
    _require(n <= most[0] and m <= most[1], f"train_images and val_images up to {most}", (n, m))
    _require(len(data.class_names) <= 256, "at most 256 classes", len(data.class_names))
    val = Batches(data.val_images[:m], data.val_labels[:m], config["batch_size"])
    model = build_from_config(config, len(data.class_names))
    guessing = {"guessing_loss": float(scipy.stats.entropy(np.bincount(data.train_labels[:n])))}
    run = {"config": config, "status": "training", "history": {key: [] for key in HISTORY},
           "environment": environment(data) | guessing}
    if _checkpoint(path).exists():
        run = _restore(_checkpoint(path), run, _state(model))
    while len(run["history"]["loss"]) < config["epochs"] and run["status"] != "diverged":
        key = (config["seed"], len(run["history"]["loss"]))
        train = Batches(data.train_images[:n], data.train_labels[:n], config["batch_size"], key)
        _train_epoch(model, train, val, run)
        arrays = {"run": json.dumps(run)} | {str(i): x for i, x in enumerate(_state(model))}
        write_atomically(_checkpoint(path), functools.partial(np.savez, **arrays))
        if verbose:
            print(_epoch_line(_run_table(run, path)), flush=True)
    _finish(path, run, model, val, keep_weights)


def _train_epoch(model, train, val, run):
    """One epoch, whose numbers are added to the run's history."""
    start = time.perf_counter()
    logs = model.fit(train, validation_data=val, shuffle=False, verbose=0).history
    logs["seconds"] = [round(time.perf_counter() - start, 3)]
    for key, values in run["history"].items():
        value = float(logs[key][0])
        values.append(value if math.isfinite(value) else None)  # JSON has no NaN
    if None in run["history"]["loss"] + run["history"]["val_loss"]:
        run["status"] = "diverged"


def _state(model):
    return [*model.variables, *model.optimizer.variables]


def _restore(path, run, state):
    """Put network and optimiser back to the last finished epoch; return the run."""
    text, *values = _read_arrays(path, ["run", *map(str, range(len(state)))])
    saved = _parse_run(str(text), path, ("training", "diverged"))
    before, now = saved["environment"], run["environment"]
    _refuse_another(path, run["config"], saved["config"])
    known = [key for key in MACHINE if key in before]  # older checkpoints lack the labels'
    _refuse_another(path, {key: now[key] for key in known}, before)
    for variable, value in zip(state, values):
        variable.assign(value)
    print(f"Going on after epoch {len(saved['history']['loss'])} of {run['config']['epochs']}.",
          flush=True)
    earlier = [*saved.get("earlier_environments", []), before]
    return saved | {"environment": now, "earlier_environments": earlier}


def _finish(path, run, model, val, keep_weights):
    """Save the answers for all validation images, the weights if wanted, and the run's file."""
    if run["status"] != "diverged":
        run["status"] = "finished"
        classes = model.predict(val, verbose=0).argmax(-1).astype("uint8")
        run["val_predictions"] = base64.b64encode(zlib.compress(classes.tobytes())).decode()
    if keep_weights:  # of a copy: a compiled model would also save its optimiser
        copy = keras.Model(model.input, model.output, name=model.name)
        write_atomically(path.with_suffix(".weights.h5"), copy.save_weights)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(run, indent=1) + "\n"))
    with contextlib.suppress(OSError):  # Windows: somebody reads it
        _checkpoint(path).unlink()


def _epoch_line(table, i=-1):
    row = table.iloc[i]
    left = 0 if row.status == "diverged" else row.epochs - row.epoch
    minutes = left * table.seconds.median() / 60
    return (f"{network_name(row)}, seed {row.seed}, epoch {row.epoch}/{row.epochs}: "
            f"loss {row.loss:.3f}, accuracy {row.accuracy:.1%}, "
            f"validation {row.val_accuracy:.1%}, {row.seconds:.0f} s, {minutes:.1f} min left")


@contextlib.contextmanager
def process_pool(workers=1):
    """An executor that trains each run in a process of its own, `workers` of them at a time.

    When the `with` block or this process ends, so do they. With TensorFlow they share the cores.
    """
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    threads = max(1, joblib.cpu_count() // workers)
    context = multiprocessing.get_context("spawn")
    read_end, write_end = context.Pipe(duplex=False)  # write_end closes when this process dies

    def in_a_process(function, *arguments):
        with concurrent.futures.ProcessPoolExecutor(
                max_workers=1, mp_context=context, initializer=_start_process,
                initargs=(read_end, threads)) as process:
            return process.submit(function, *arguments).result()

    try:
        yield types.SimpleNamespace(submit=functools.partial(pool.submit, in_a_process))
    finally:
        write_end.close()
        pool.shutdown(cancel_futures=True)


def _start_process(read_end, threads):
    """In a new process: take a share of the cores, and end when the pipe's other end is closed."""

    def wait_and_end():
        with contextlib.suppress(EOFError, OSError):
            read_end.recv()
        with _writing:  # not in the middle of a file
            os._exit(1)

    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))  # read when TensorFlow starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends it through the pipe
    threading.Thread(target=wait_and_end, daemon=True).start()


def train_runs(configs, executor=None, folder=None, keep_weights=False, show=None):
    """Train the runs that are not there yet; return all, as `read_runs` does.

    Prints a line per epoch. A failure stops what it can; finished epochs are kept. `executor`
    is anything with `submit`: a `process_pool` (of one, by default), or a cluster (Dask, submitit)
    that sees the same folder. `show` is called with all epochs so far whenever one has ended.
    """
    configs = list(configs)
    paths = [run_path(config, folder) for config in configs]
    _require(0 < len(paths) == len(set(paths)), "each run once, and at least one", paths)
    missing = [path for path in paths if not path.exists()]
    tables = {}
    for path, config in zip(paths, configs):  # what is damaged is found before anything trains
        run = _check_saved(path, config, keep_weights)
        tables[path] = _run_table(run, path) if run else pd.DataFrame()
    with contextlib.ExitStack() as stack:
        executor = executor or stack.enter_context(process_pool())
        jobs = {}
        try:
            for path, config in zip(paths, configs):
                if path not in missing:
                    print(f"{path.stem}: loaded, not trained again")
                    continue
                jobs[path] = executor.submit(train_run, config, path.parent, keep_weights, False)
            _watch(jobs, tables, show)
        finally:
            for job in jobs.values():
                if not job.done():
                    with contextlib.suppress(Exception):  # the others shall be cancelled, too
                        job.cancel()
    return pd.concat(tables.values(), ignore_index=True)


def _watch(jobs, tables, show):
    """Tell each epoch as it ends, and raise the first failure."""
    while jobs:
        time.sleep(0.5)
        # Asked before the files are read, so that no last epoch is missed.
        ended = [path for path in jobs if jobs[path].done()]
        news = [_tell(path, tables) for path in jobs]
        if show and any(news):
            show(pd.concat(tables.values(), ignore_index=True))
        for path in ended:
            try:
                run = jobs.pop(path).result()
            except Exception as error:
                error.add_note(f"The run was {path.stem}; its finished epochs are kept.")
                raise
            if not run:
                raise RuntimeError(f"{path.stem} came back untrained.")
            tables[path] = _run_table(run, path)


def _tell(path, tables):
    """Print a run's new epochs; return how many there are."""
    known = len(tables[path])
    with contextlib.suppress(ValueError, OSError):  # as where a network's file system is late
        run = _saved_run(path)
        if run:
            tables[path] = _run_table(run, path)
    number = list(tables).index(path) + 1
    for i in range(known, len(tables[path])):
        print(f"[{number}/{len(tables)}] {_epoch_line(tables[path], i)}", flush=True)
    return len(tables[path]) - known


# ---- results ----


def read_run(path):
    """Read one run's file as a dict; entries younger than the file have their usual values."""
    return _parse_run(pathlib.Path(path).read_bytes(), path, ("finished", "diverged"))


def _parse_run(text, path, statuses):
    try:
        run = json.loads(text)
        run["history"] = {key: run["history"][key] for key in HISTORY}
        for key, usual in NEWER.items():
            run["config"].setdefault(key, usual)
        _require_one_of("model", run["config"]["model"], MODELS)
        _require_one_of("status", run["status"], statuses)
        table = _run_table(run, path)
        needed = {*NETWORK, *RECIPE, "learning_rate", "seed"} - {"labels_crc32"}  # that is younger
        empty = [key for key in needed if table[key].isna().any()]
        _require(len(table) and not empty, "an epoch, and no empty entry", empty)
        _require(len(table) == run["config"]["epochs"] or run["status"] != "finished",
                 f"{run['config']['epochs']} epochs", len(table))
        return run
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or another file ({error!r}). Move it away.") from error


def read_runs(folder):
    """Read a folder's runs: a DataFrame with a row per epoch, history beside configuration."""
    paths = sorted(pathlib.Path(folder).glob("[!.]*.json"))  # a hidden one is half written
    if not paths:
        raise FileNotFoundError(f"No runs in {folder}. Notebook 3 trains them.")
    return pd.concat([_run_table(read_run(path), path) for path in paths], ignore_index=True)


def _run_table(run, path):
    history = pd.DataFrame(run["history"], dtype=float)
    saved = run["environment"]
    classes = saved.get("classes", 2)  # the oldest runs are of cats and dogs,
    guessing = saved.get("guessing_loss", math.log(classes))  # and of classes of equal size
    machine = {key: saved.get(key, math.nan) for key in MACHINE}
    # All columns at once: one by one they take four times as long.
    return pd.DataFrame({
        **history, "file": pathlib.Path(path).name, "status": run["status"], "classes": classes,
        "guessing_loss": guessing, "epoch": range(1, len(history) + 1), **run["config"], **machine})


def network_name(row):
    """The network of a run (a row of `read_runs`) in words, such as "plain-56, mirrored"."""
    usual = make_config(row.model, "full", "cats_vs_dogs")
    words = [display_name(row.model)]
    for key in NETWORK[1:]:
        if row[key] != usual[key]:
            share = "" if row[key] == 1 else f" {row[key]}"
            words.append(key.replace("_", " ") + share)
    return ", ".join(words)


def last_epochs(runs):
    """The last epoch of each run, without numbers where it diverged.

    Raises ValueError, which names files, if runs cannot be compared: they differ in the recipe or
    the machine, have not ended, a network has several learning rates, or a seed is there twice.
    """
    for key in RECIPE:
        files = runs.groupby(key).file.unique()  # without NaN: runs older than the checksum
        if len(files) > 1:
            some = {value: list(names[:3]) for value, names in files.items()}
            raise ValueError(f"These runs cannot be compared: they differ in {key} ({some}).")
    twice = runs[runs.duplicated(["file", "epoch"])].file.unique()
    _require(not len(twice), "files with different names", f"more than one {', '.join(twice)}")
    last = runs.sort_values("epoch", kind="stable").groupby("file").tail(1).copy()
    unfinished = last[(last.epoch < last.epochs) & (last.status != "diverged")].file.tolist()
    _require(not unfinished, "runs with all their epochs", unfinished)
    last.loc[last.status == "diverged", list(HISTORY)] = math.nan
    for network, part in last.groupby(NETWORK):
        _require(part.learning_rate.nunique() == 1 and part.seed.is_unique,
                 f"runs of {network[0]} with one learning rate, and one run per seed",
                 part[["file", "learning_rate", "seed"]].values.tolist())
    return last


def compare(plain, residual, metric="val_accuracy"):
    """Residual minus plain after equal epochs, from the `last_epochs` of two networks, as a dict.

    Means over seeds, standard deviations, numbers of seeds and of runs that hardly learned (their
    training loss is not below 98% of that of guessing by the shares of the classes), and the ends
    of the difference's 95% confidence interval (Welch's). NaN: a run diverged, or, for the
    interval, there is only one seed.
    """
    _require_one_of("metric", metric, HISTORY)
    row = {}
    for kind, runs in (("plain", plain), ("residual", residual)):
        hardly = ~(runs.loss < 0.98 * runs.guessing_loss)  # also where it diverged
        row |= {kind: runs[metric].mean(skipna=False), f"{kind} sd": runs[metric].std(skipna=False),
                f"{kind} seeds": len(runs), f"{kind} rate": runs.learning_rate.iloc[0],
                f"{kind} hardly learned": hardly.sum()}
    row["difference"] = row["residual"] - row["plain"]
    with warnings.catch_warnings(action="ignore"):  # where all seeds end equal
        test = scipy.stats.ttest_ind(residual[metric], plain[metric], equal_var=False)
    row["low"], row["high"] = test.confidence_interval()
    return row


def ablation_table(runs, metric="val_accuracy"):
    """Plain against residual: a row of `compare` for each residual network and its plain twin.

    The twins have the same depth and start. Raises ValueError for what cannot be compared.
    """
    last = last_epochs(runs)
    last["layers"] = last.model.map(MODELS)
    last["is_plain"] = last.model.str.startswith("plain")
    twins = ["layers", "stem", "stride_in", "mirrored"]
    alone = last[last.groupby(twins).is_plain.transform("nunique") == 1].file.tolist()
    needed = f"a plain and a residual network, equal in {', '.join(twins)}"
    _require(len(last) and not alone, needed, alone)
    rows = {}
    for _, pair in last.groupby(twins):
        for _, residual in pair[~pair.is_plain].groupby(NETWORK):
            row = residual.iloc[0]
            name = network_name(row).replace(display_name(row.model), f"{row.layers} layers")
            rows[name] = compare(pair[pair.is_plain], residual, metric)
    return pd.DataFrame.from_dict(rows, orient="index")


# ---- plots ----

# Hue is the kind, warm for plain and cool for residual; shade is the depth.
SHADES = {kind: sns.color_palette(palette, 8).as_hex()[3:]
          for kind, palette in (("plain", "YlOrRd"), ("resnet", "YlGnBu"))}
COLOURS = {f"{kind}{depth}": SHADES[kind][i % 5]  # five of Table 1, then five of section 4.2
           for kind in SHADES for i, depth in enumerate(DEPTHS)}
# For plt.rcParams.update: what the figures of the notebooks share.
STYLE = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook", 11 / 12),
         "figure.dpi": 90, "savefig.dpi": 180, "savefig.facecolor": "white",
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}


def plot_histories(runs):
    """Draw losses and accuracies against epochs, a column per depth, a colour per network.

    Training is solid, validation dashed. With several seeds a line is their mean (of those that
    have not diverged), a band their range. Raises ValueError for runs of a network that differ in
    more than the seed.
    """
    differ = [key for key in (*NETWORK, *RECIPE, "learning_rate")
              if (runs.groupby("model")[key].nunique() > 1).any()]
    _require(not differ, "runs of a network that differ in the seed alone", f"also {differ}")
    twice = runs[runs.duplicated(["model", "seed", "epoch"])].file.unique().tolist()
    _require(not twice, "one run per network and seed", twice)
    depths = sorted(set(runs.model.map(MODELS)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(depths), sharex=True, sharey="row", squeeze=False,
                                    figsize=(3 * len(depths), 4.8), layout="constrained")
        for model, part in runs.groupby("model"):
            column = axes[:, depths.index(MODELS[model])]
            column[0].set_title(f"{MODELS[model]} layers")
            for axis, metric in zip(column, ("loss", "accuracy")):
                _plot_seeds(axis, part, metric, "-", label=display_name(model))
                _plot_seeds(axis, part, f"val_{metric}", "--")
        for axis in axes.flat:
            _label_ends(axis, runs.epochs.max())
        axes[0, 0].set_ylabel("loss")
        axes[1, 0].set_ylabel("accuracy")
        axes[1, 0].yaxis.set_major_formatter("{x:.0%}")
        figure.supxlabel("epoch (solid: training, dashed: validation)", size=11)
    return figure


def _plot_seeds(axis, part, key, line, label=None):
    seeds = part.pivot(index="epoch", columns="seed", values=key).dropna(how="all")
    colour = COLOURS[part.model.iloc[0]]
    axis.plot(seeds.mean(axis=1), line, marker=".", markersize=4, color=colour, label=label)
    axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=colour, alpha=0.2,
                      linewidth=0)


def _label_ends(axis, epochs):
    """Name the solid lines where they end, the lower one a little lower."""
    axis.set_xlim(0, 1.5 * epochs)
    axis.set_xticks(range(0, epochs + 1, max(1, epochs // 3)))
    axis.margins(y=0.15)  # room for a name at the edge
    lines = [line for line in axis.get_lines() if not line.is_dashed() and len(line.get_xdata())]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    for i, line in enumerate(lines):
        axis.annotate(line.get_label(), line.get_xydata()[-1], (4, 0), textcoords="offset points",
                      color=line.get_color(), va="bottom" if i else "top",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
