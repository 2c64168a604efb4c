"""The nets against other implementations, the paper's tables and the paper's equations."""

import functools
import pathlib
import re

import keras
import numpy as np
import pytest
import resnet_helpers as rh
import tensorflow as tf
from notebook_code import stage_table
from training_runs import predictions

ROOT = pathlib.Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "results" / "weights"


@functools.cache
def shared_net(name, size=32, classes=2, **options):
    """A net for tests that do not change it."""
    return rh.create_model(name, (size, size, 3), classes, seed=0, **options)


def random_images(size, count=4):
    return np.random.default_rng(0).random((count, size, size, 3)).astype(keras.config.floatx())


def trainable(model):
    return sum(weight.shape.num_elements() for weight in model.trainable_weights)


def layer_weights(model):
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def difference(actual, expected):
    """The largest difference, relative to the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def randomize(model, seed=0):
    """Random batch norms and biases around fitting statistics: else the signal dies or explodes."""
    rng = np.random.default_rng(seed)
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
        layer.beta.assign(rng.normal(0, 0.3, layer.beta.shape))
        layer.momentum = 0.0
    model(random_images(model.input_shape[1], 16), training=True)
    for layer in norms:
        *_, mean, variance = layer.get_weights()
        layer.moving_mean.assign(mean + 0.2 * np.sqrt(variance) * rng.normal(size=mean.shape))
        layer.moving_variance.assign(
            (variance + 0.1 * variance.mean()) * rng.uniform(0.5, 1.5, mean.shape)
        )
    bias = model.get_layer("predictions").bias
    bias.assign(rng.normal(size=bias.shape))
    return model


def input_gradient(model, images, labels):
    """Logits, and the gradient of the cross-entropy with respect to the images."""
    images = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = model(images, training=False)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return logits.numpy(), tape.gradient(loss, images).numpy()


def kernel_gradients(model, images, labels, names):
    kernels = [model.get_layer(name).kernel.value for name in names]
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return [gradient.numpy() for gradient in tape.gradient(loss, kernels)]


# -------------------- other implementations


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_parity_with_keras_applications(depth):
    weights = None
    for size, count in ((64, 4), *([(32, 4), (224, 2)] if depth == 50 else [])):
        ours = rh.create_model(f"resnet{depth}", (size, size, 3), 10, seed=0)
        if weights:
            ours.set_weights(weights)
        weights = randomize(ours).get_weights() if size == 64 else weights
        theirs = getattr(keras.applications, f"ResNet{depth}")(
            weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
        )
        copied = layer_weights(ours)
        assert copied.keys() == layer_weights(theirs).keys()
        for name, arrays in copied.items():
            layer = theirs.get_layer(name)
            if isinstance(layer, keras.layers.Conv2D):
                arrays = [
                    *arrays,
                    np.zeros(layer.filters),
                ]  # theirs adds a bias, which the batch norm takes away
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.epsilon = 1e-5
            layer.set_weights(arrays)
        images = random_images(size, count)
        logits = theirs(images, training=False)
        assert (
            np.ptp(logits, axis=0).max() > 1e-2 * np.abs(logits).max()
        )  # else the images would not matter
        assert difference(ours(images, training=False), logits) <= 1e-5


@pytest.fixture
def double_precision():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


# In float32 rounding puts some of the millions of values on the other side of a ReLU's kink,
# where the gradient jumps.
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    "name, size, options",
    [
        ("resnet18", 32, {}),
        ("resnet18", 96, {}),
        ("resnet18", 32, {"shortcut": "projection_all"}),
        ("resnet18", 32, {"stem": "cifar"}),
        ("plain18", 32, {}),
        ("resnet34", 32, {}),
        ("resnet34", 32, {"shortcut": "zero_pad"}),
        ("plain34", 32, {}),
        ("resnet50", 32, {"stride_in": "3x3"}),
        ("resnet50", 64, {"stride_in": "3x3"}),
        ("resnet50", 32, {"shortcut": "zero_pad"}),
        ("plain50", 32, {}),
        ("plain50", 64, {"stride_in": "3x3"}),
        ("resnet20", 32, {}),
        ("plain20", 32, {}),
        ("resnet32", 32, {"shortcut": "projection"}),
        ("resnet56", 32, {}),
        ("plain56", 32, {}),
    ],
    ids=str,
)
def test_parity_with_pytorch(name, size, options):
    torch = pytest.importorskip(
        "torch", reason="the independent reference is written in PyTorch (a test-only package)"
    )
    import reference_torch

    ours = randomize(rh.create_model(name, (size, size, 3), 10, seed=1, **options))
    depth = int(name[-2:])
    usual = "zero_pad" if depth in reference_torch.SMALL else "projection"
    shortcut = "none" if name.startswith("plain") else options.get("shortcut", usual)
    theirs = (
        reference_torch.Net(
            depth, 10, shortcut, options.get("stride_in") == "3x3", options.get("stem") == "cifar"
        )
        .double()
        .eval()
        .requires_grad_(False)
    )
    theirs.load(layer_weights(ours))
    images, labels = random_images(size), np.arange(4)
    logits, gradient = input_gradient(ours, images, labels)

    inputs = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    outputs = theirs(inputs)
    torch.nn.functional.cross_entropy(outputs, torch.tensor(labels)).backward()
    outputs = outputs.detach().numpy()
    assert (
        np.ptp(outputs, axis=0).max() > 1e-2 * np.abs(outputs).max()
    )  # else the images would not matter
    assert difference(logits, outputs) <= 1e-11
    assert difference(gradient, inputs.grad.numpy().transpose(0, 2, 3, 1)) <= 1e-11


# -------------------- convolution


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (1, 2), (2, 1), (1, 5), (3, 2), (6, 3)],
    ids=str,
)
def test_convolution_pads_alike_on_all_sides(kernel_size, stride, shape):
    rng, pad = np.random.default_rng(0), kernel_size // 2
    # 8 channels: TensorFlow 2.21 on one thread writes past the gradient of a strided 1x1
    # convolution from 3 to 4.
    inputs = tf.constant(rng.normal(size=(2, *shape, 8)), "float32")
    layer = rh.Conv2D(8, kernel_size, strides=stride, padding="same", use_bias=False)
    symbolic = layer(keras.Input((*shape, 8)))
    kernel = layer.kernel.value
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
        padded = tf.pad(inputs, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        expected = keras.ops.conv(padded, kernel, strides=stride, padding="valid")
        direction = tf.constant(rng.normal(size=expected.shape), "float32")
        losses = [tf.reduce_sum(result * direction) for result in (outputs, expected)]
    assert symbolic.shape[1:] == outputs.shape[1:]
    active = rh.Conv2D(
        8, kernel_size, strides=stride, padding="same", use_bias=False, activation="relu"
    )
    active.build(inputs.shape)
    active.kernel.assign(kernel)
    np.testing.assert_array_equal(active(inputs), tf.nn.relu(outputs))
    biased = rh.Conv2D(8, kernel_size, strides=stride, padding="same")
    biased.build(inputs.shape)
    biased.set_weights([kernel, np.arange(8)])
    np.testing.assert_allclose(biased(inputs), outputs + np.arange(8), atol=1e-4)
    assert difference(outputs, expected) <= 1e-5
    for variable in (inputs, kernel):
        assert difference(*(tape.gradient(loss, variable) for loss in losses)) <= 1e-5


@pytest.mark.parametrize(
    "size, options",
    [
        (4, {"kernel_size": 3, "strides": 2, "padding": "valid"}),
        (2, {"kernel_size": 3, "padding": "same", "dilation_rate": 2}),
        (4, {"kernel_size": 1, "padding": "same", "groups": 2}),
        (2, {"kernel_size": 3, "padding": "same", "groups": 2}),
    ],
    ids=str,
)
def test_other_convolutions_are_kerass(size, options):
    inputs = np.random.default_rng(0).normal(size=(2, size, size, 8)).astype("float32")
    ours, theirs = (kind(8, **options) for kind in (rh.Conv2D, keras.layers.Conv2D))
    ours.build(inputs.shape)
    theirs.build(inputs.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(ours(inputs), theirs(inputs), atol=1e-5)


def test_saved_net_gives_the_same_outputs(tmp_path):
    net = randomize(rh.build_resnet((32, 32, 3), [1] * 4, [4, 6, 8, 10], 3, shortcut="zero_pad"))
    net.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded(random_images(32)), net(random_images(32)))


# -------------------- the paper's tables


@pytest.mark.parametrize(
    "name, count",
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("plain34", 21_623_848),
        ("resnet50", 25_557_032),
        ("plain50", 22_780_456),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_trainable_parameters_with_1000_classes(name, count):
    net = shared_net(name, 224, 1000)
    assert (trainable(net), stage_table(net).loc["total", "parameters"]) == (count, count)


@pytest.mark.parametrize(
    "name, count",
    [
        ("resnet34", 21_302_722),
        ("plain34", 21_127_106),
        ("resnet50", 23_565_250),
        ("plain50", 20_780_994),
    ],
)
def test_all_parameters_with_2_classes(name, count):
    assert shared_net(name).count_params() == count


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_zero_padded_shortcuts_have_no_parameters(depth):
    twins = (
        shared_net(f"resnet{depth}", 224, 1000, shortcut="zero_pad"),
        shared_net(f"plain{depth}", 224, 1000),
    )
    assert trainable(twins[0]) == trainable(twins[1])


# The paper gives one decimal. Its 18 and 34 have shortcuts without multiply-adds (Figure 3), its
# deeper nets projections: without them ResNet-50 would have 3.5, with them it has 3.86, of which
# the paper prints 3.8.
@pytest.mark.parametrize(
    "name, options, units, billions",
    [
        ("resnet18", {"shortcut": "zero_pad"}, [2, 2, 2, 2], 1.8),
        ("resnet34", {"shortcut": "zero_pad"}, [3, 4, 6, 3], 3.6),
        ("plain34", {}, [3, 4, 6, 3], 3.6),
        ("resnet50", {}, [3, 4, 6, 3], 3.8),
        ("resnet101", {}, [3, 4, 23, 3], 7.6),
        ("resnet152", {}, [3, 8, 36, 3], 11.3),
    ],
)
def test_stage_table_is_table_1_of_the_paper(name, options, units, billions):
    table = stage_table(shared_net(name, 224, 1000, **options))
    depth = rh.MODELS[name]
    widths, layers = (
        [64, 128, 256, 512],
        "1x1, {0}; 3x3, {0}; 1x1, {1}" if depth >= 50 else "3x3, {0}; 3x3, {0}",
    )
    outputs = [4 * width if depth >= 50 else width for width in widths]
    sizes = [f"{size}x{size}x{n}" for size, n in zip((56, 28, 14, 7), outputs)]
    assert list(table.index) == [
        "conv1",
        "conv2_x",
        "conv3_x",
        "conv4_x",
        "conv5_x",
        "classifier",
        "total",
    ]
    assert list(table["output"]) == ["112x112x64", *sizes, "1000", ""]
    assert list(table["layers"]) == [
        "7x7, 64",
        *map(layers.format, widths, outputs),
        "fc, 1000",
        "",
    ]
    assert list(table["units"]) == [0, *units, 0, sum(units)]
    assert table.loc["total", "weight layers"] == depth
    assert table.loc["total", "multiply-adds"] / 1e9 == pytest.approx(billions, abs=0.06)


# Section 4.2, and the parameters of its Table 6, in millions.
@pytest.mark.parametrize(
    "depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_networks_of_section_4_2(depth, millions):
    plain, residual = (shared_net(f"{kind}{depth}", classes=10) for kind in ("plain", "resnet"))
    assert trainable(plain) == trainable(residual)  # option A: no parameters in the shortcuts
    assert trainable(plain) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)
    table, units = stage_table(residual), (depth - 2) // 6
    assert list(table.index) == ["conv1", "conv2_x", "conv3_x", "conv4_x", "classifier", "total"]
    assert list(table["output"]) == ["32x32x16", "32x32x16", "16x16x32", "8x8x64", "10", ""]
    stages = [f"3x3, {width}; 3x3, {width}" for width in (16, 32, 64)]
    assert list(table["layers"]) == ["3x3, 16", *stages, "fc, 10", ""]
    assert list(table["units"]) == [0, units, units, units, 0, 3 * units]
    assert table.loc["total", "weight layers"] == depth


# -------------------- twins and shortcuts


@pytest.mark.parametrize("depth, units", [(18, 8), (34, 16), (50, 16), (20, 9), (56, 27)])
def test_twins_differ_in_the_shortcuts_and_nothing_else(depth, units):
    plain, residual = (shared_net(f"{kind}{depth}") for kind in ("plain", "resnet"))
    adds = [
        [layer.name for layer in net.layers if isinstance(layer, keras.layers.Add)]
        for net in (plain, residual)
    ]
    assert list(map(len, adds)) == [0, units]
    common = [
        layer.name
        for layer in residual.layers
        if layer.name not in adds[1] and "_0_" not in layer.name
    ]
    assert sorted(common) == sorted(layer.name for layer in plain.layers)
    weights = layer_weights(residual)
    for name, arrays in layer_weights(plain).items():
        for ours, twin in zip(arrays, weights[name], strict=True):
            np.testing.assert_array_equal(ours, twin, name)


@pytest.mark.parametrize("name", ["resnet34", "plain50", "resnet20"])
def test_batch_norm_follows_a_batch_as_the_series_says(name):
    net = shared_net(name)
    norms = [layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(0.9, 1e-5)}


def test_a_unit_strides_once_whatever_its_kernels():
    x = keras.Input((8, 8, 4))
    for kernel_sizes in ((1,), (3,), (1, 1), (1, 3, 1), [1, 3, 1]):
        for stride_in in ("1x1", "3x3"):
            y = rh.build_unit(x, kernel_sizes, [8] * len(kernel_sizes), 2, "u", stride_in=stride_in)
            assert y.shape == (None, 4, 4, 8)


def test_initial_weights_differ_between_layers_and_seeds():
    nets = [rh.build_resnet((32, 32, 3), [2], [8], 2, seed=seed) for seed in (3, 4)]
    names = "conv2_block1_1_conv", "conv2_block1_2_conv", "conv2_block2_1_conv"
    kernels = [net.get_layer(name).get_weights()[0] for net in nets for name in names]
    assert len({kernel.tobytes() for kernel in kernels}) == 6
    assert np.std(kernels) == pytest.approx(np.sqrt(2 / (9 * 8)), rel=0.05)  # He initialisation


def residual_branch_at_zero(name, before, unit, **options):
    """One unit of a net as a model, with a residual branch of 0, and an input of both signs."""
    net = randomize(rh.create_model(name, seed=0, **options))
    last = max(layer.name for layer in net.layers if re.fullmatch(rf"{unit}_[123]_bn", layer.name))
    for weight in (net.get_layer(last).gamma, net.get_layer(last).beta):
        weight.assign(np.zeros(weight.shape))
    start = net.get_layer(before).output
    x = np.random.default_rng(0).normal(size=(2, *start.shape[1:])).astype("float32")
    return keras.Model(start, net.get_layer(f"{unit}_out").output), x


@pytest.mark.parametrize("name", ["resnet34", "plain34", "resnet50", "plain50"])
def test_unit_with_a_zero_branch_is_the_identity_or_dead(name):
    unit, x = residual_branch_at_zero(name, "conv2_block1_out", "conv2_block2")
    np.testing.assert_array_equal(
        unit(x), np.maximum(x, 0) if name.startswith("resnet") else np.zeros_like(x)
    )


@pytest.mark.parametrize(
    "name, before, unit, stride",
    [
        ("resnet34", "conv3_block4_out", "conv4_block1", 2),
        ("resnet50", "pool1_pool", "conv2_block1", 1),
        ("resnet50", "conv4_block6_out", "conv5_block1", 2),
    ],
)
def test_zero_padded_shortcut_subsamples_and_adds_empty_channels(name, before, unit, stride):
    model, x = residual_branch_at_zero(name, before, unit, shortcut="zero_pad")
    expected = np.zeros((len(x), *model.output_shape[1:]), "float32")
    expected[..., : x.shape[-1]] = np.maximum(x[:, ::stride, ::stride], 0)
    np.testing.assert_array_equal(model(x), expected)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet20"])
def test_zero_gamma_starts_with_residual_branches_that_are_zero(name):
    usual, zero = (rh.create_model(name, seed=0, zero_gamma=option) for option in (False, True))
    before = layer_weights(usual)
    changed = {
        layer
        for layer, arrays in layer_weights(zero).items()
        if any((a != b).any() for a, b in zip(arrays, before[layer]))
    }
    last = 3 if name == "resnet50" else 2
    assert changed == {
        layer.name.replace("out", f"{last}_bn")
        for layer in usual.layers
        if layer.name.endswith("_out")
    }
    branch = keras.Model(zero.input, [zero.get_layer(layer).output for layer in changed])
    assert not any(np.any(output) for output in branch(random_images(32), training=True))


@pytest.mark.parametrize(
    "options, units",
    [
        ({"shortcut": "zero_pad"}, 0),
        ({}, 3),
        ({"shortcut": "projection_all"}, 16),
    ],
)
def test_units_with_a_projection(options, units):
    names = [layer.name for layer in shared_net("resnet34", 224, 1000, **options).layers]
    assert sum(name.endswith("_0_conv") for name in names) == units


def test_channels_first_are_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="channels_last in keras.json. Received: channels_fi"):
            rh.create_model("plain20")
    finally:
        keras.config.set_image_data_format("channels_last")


# -------------------- starts and scaled shortcuts


def hidden_outputs(net):
    """A model of the outputs of all convolutions' batch norms, each before its ReLU."""
    return keras.Model(
        net.input, [layer.output for layer in net.layers if layer.name.endswith("_bn")]
    )


def test_mirrored_kernels_are_mirrored_and_he_is_left_of_them():
    he, mirrored, half = (
        rh.create_model("plain20", seed=0, mirrored=share) for share in (0, 1, 0.5)
    )
    for name, (kernel, *_) in layer_weights(mirrored).items():
        if not name.endswith("_conv"):
            continue
        start, v = he.get_layer(name).kernel.numpy(), kernel[..., : kernel.shape[-1] // 2]
        np.testing.assert_array_equal(kernel[..., kernel.shape[-1] // 2 :], -v)
        if name != "conv1_conv":
            v = v[:, :, : kernel.shape[2] // 2]
            np.testing.assert_array_equal(kernel[:, :, kernel.shape[2] // 2 :, : v.shape[-1]], -v)
        np.testing.assert_array_equal(v, start[:, :, : v.shape[2], : v.shape[3]])
        np.testing.assert_allclose(half.get_layer(name).kernel, (kernel + start) / 2, atol=1e-7)
    assert mirrored.count_params() == he.count_params()


@pytest.mark.parametrize("name", ["plain20", "plain56", "plain34", "plain50"])
def test_a_mirrored_plain_network_is_linear(name):
    """With the start's statistics (mean 0, variance 1) only the ReLUs could be nonlinear."""
    net = rh.create_model(name, (64, 64, 3), seed=0, mirrored=1)
    start = net.get_layer("conv1_relu" if "20" in name or "56" in name else "pool1_pool").output
    linear = keras.Model(start, hidden_outputs(net).outputs[1:])
    rng, channels = np.random.default_rng(0), start.shape[-1] // 2

    def outputs(u):
        return linear(np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)], -1), training=False)

    first, second = rng.normal(size=(2, 2, *start.shape[1:3], channels)).astype("float32")
    for a, b, both in zip(
        outputs(first), outputs(second), outputs(2 * first - 3 * second), strict=True
    ):
        assert difference(2 * a - 3 * b, both) <= 1e-5
        np.testing.assert_allclose(
            both[..., : both.shape[-1] // 2],
            -both[..., both.shape[-1] // 2 :],
            atol=1e-5 * np.abs(both).max(),
        )
    usual = rh.create_model(name, (64, 64, 3), seed=0)
    usual = keras.Model(
        usual.get_layer(start._keras_history.operation.name).output,
        hidden_outputs(usual).outputs[1:],
    )
    inputs = np.abs(rng.normal(size=(2, *start.shape[1:]))).astype("float32")
    assert (
        difference(usual(2 * inputs)[-1], 2 * usual(inputs)[-1]) <= 1e-5
    )  # both are homogeneous ...
    flipped = np.roll(
        inputs, channels, -1
    )  # ... but only a linear network turns -u into the opposite output
    assert difference(usual(flipped)[-1], -usual(inputs)[-1]) > 0.1


def test_a_mirrored_network_keeps_its_form_with_the_statistics_of_a_batch():
    for output in hidden_outputs(rh.create_model("plain56", seed=0, mirrored=1))(
        random_images(32, 8), training=True
    ):
        half = output.shape[-1] // 2
        np.testing.assert_allclose(output[..., :half], -output[..., half:], atol=1e-4)


@pytest.mark.parametrize(
    "name, options", [("resnet20", {}), ("resnet20", {"shortcut": "projection"}), ("resnet50", {})]
)
def test_scaled_shortcuts(name, options):
    usual, scaled = (rh.create_model(name, seed=0, shortcut_scale=a, **options) for a in (1, 0.25))
    units = [layer.name for layer in usual.layers if isinstance(layer, keras.layers.Add)]
    assert units == [
        layer.name.replace("_scale", "_add")
        for layer in scaled.layers
        if layer.name.endswith("_scale")
    ]
    assert scaled.count_params() == usual.count_params()
    for unit in (units[0], units[-1]):
        add, scale = scaled.get_layer(unit), scaled.get_layer(unit.replace("_add", "_scale"))
        parts = keras.Model(scaled.input, [scale.input, add.input[1], add.output])
        x, f, y = parts(random_images(32), training=False)
        assert np.abs(x).max() > 0
        np.testing.assert_allclose(y, f + 0.25 * x, atol=1e-5)


def test_other_batch_norms_are_kerass():
    images = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype("float32")
    for options in ({"scale": False}, {"center": False}, {"axis": 1}):
        ours, keras_own = (kind(**options)(images, training=True) for kind in (
            rh.BatchNormalization, keras.layers.BatchNormalization))
        assert difference(ours, keras_own) == 0


@pytest.mark.parametrize("shape", [(4, 6, 5, 8), (16, 1, 1, 4), (64, 8, 8, 16)])
def test_the_fused_batch_norm_equals_kerass(shape):
    ours, keras_own = (
        kind(momentum=0.9, epsilon=1e-5)
        for kind in (rh.BatchNormalization, keras.layers.BatchNormalization)
    )
    rng = np.random.default_rng(0)
    results = []
    inputs, weight = (tf.constant(rng.normal(0.3, 2, shape), "float32") for _ in range(2))
    start = [rng.normal(size=shape[-1]) for _ in range(4)]
    start[3] = np.abs(start[3])
    for layer in (ours, keras_own):
        layer.build(shape)
        layer.set_weights(start)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = layer(inputs, training=True)
            total = tf.reduce_sum(output * weight)
        gradients = tape.gradient(total, [inputs, layer.gamma.value, layer.beta.value])
        results.append([output, *gradients, *layer.get_weights(), layer(inputs, training=False)])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) <= 1e-4


# -------------------- errors


def small_block(kernel_sizes=(3, 3), channel_sizes=(4, 4), num_units=1, **options):
    return rh.build_resnet_block(
        keras.Input((8, 8, 4)), 2, num_units, kernel_sizes, channel_sizes, **options
    )


@pytest.mark.parametrize(
    "build, received, allowed",
    [
        (lambda: rh.create_model("resnet35"), "'resnet35'", "resnet34"),
        (
            lambda: rh.create_model("plain18", shortcut="option_d"),
            "'option_d'",
            "zero_pad, projection, projection_all",
        ),
        (lambda: rh.create_model("resnet50", stride_in="5x5"), "'5x5'", "1x1, 3x3"),
        (lambda: rh.create_model("resnet18", stem="mnist"), "'mnist'", "imagenet, cifar"),
        (lambda: rh.create_model("resnet18", num_classes=1), "1", "at least 2"),
        (lambda: rh.create_model("resnet18", (32, 31, 3)), "(32, 31, 3)", "at least 32"),
        (lambda: rh.create_model("resnet20", (7, 8, 3)), "(7, 8, 3)", "at least 8"),
        (lambda: rh.create_model("resnet18", (7, 8, 3), stem="cifar"), "(7, 8, 3)", "at least 8"),
        (
            lambda: rh.create_model("plain18", zero_gamma=True),
            "is_plain=True",
            "shortcuts, for zero_gamma",
        ),
        (
            lambda: rh.create_model("plain18", shortcut_scale=0.5),
            "is_plain=True",
            "shortcuts, for zero_gamma and shortcut_scale",
        ),
        (lambda: rh.create_model("plain18", mirrored=1.5), "1.5", "mirrored from 0 to 1"),
        (
            lambda: rh.build_resnet((8, 8, 3), [1], [5], 2, stem="cifar", mirrored=1),
            "(3, 3, 3, 5)",
            "even numbers of channels",
        ),
        (lambda: rh.create_model("resnet18", (32, 32)), "(32, 32)", "(height, width, channels)"),
        (
            lambda: rh.build_resnet((32, 32, 3), [2, 2], [64], 2),
            "([2, 2], [64])",
            "equal lengths > 0",
        ),
        (lambda: small_block((3, 3), (4,)), "((3, 3), (4,))", "equal lengths > 0"),
        (lambda: small_block((), ()), "((), ())", "equal lengths > 0"),
        (lambda: small_block(num_units=0), "0", "num_units of at least 1"),
        (
            lambda: small_block(shortcut="option_d"),
            "'option_d'",
            "zero_pad, projection, projection_all",
        ),
    ],
)
def test_errors_name_what_was_received_and_what_is_allowed(build, received, allowed):
    with pytest.raises(ValueError, match=rf"Received: {re.escape(received)}\.") as error:
        build()
    assert allowed in str(error.value)


# -------------------- what goes through a net


@pytest.mark.parametrize(
    "stem, size, used", [("imagenet", 8, np.eye(3)[1] * np.eye(3)[:, 1:2]), ("cifar", 32, 1)]
)
def test_kernel_weights_that_see_only_padding_get_no_gradient(stem, size, used):
    net = rh.create_model("resnet34", seed=0, stem=stem)
    assert net.get_layer("conv2_block1_out").output.shape[1:3] == (size, size)
    (gradient,) = kernel_gradients(net, random_images(32), [0, 1, 1, 0], ["conv5_block2_1_conv"])
    np.testing.assert_array_equal(np.abs(gradient).max((2, 3)) > 0, np.ones((3, 3)) * used > 0)


# -------------------- trained weights


def load_trained(name):
    model = rh.create_model(name.partition("_")[0])
    model.load_weights(WEIGHTS / f"{name}.weights.h5")
    return model


@pytest.mark.parametrize("name", ["plain20", "resnet20", "plain56", "plain56_mirrored", "resnet56"])
def test_trained_weights_are_as_good_as_their_run_and_their_card_says(name):
    model, _, start = name.partition("_")
    ending = f"-{start}_1.0" if start else ""
    files = (ROOT / "results" / "full" / "cats_vs_dogs").glob(
        f"{model}-learning_rate_0.003{ending}-seed[012].json")
    three = sorted(map(rh.read_run, files), key=lambda run: run["history"]["val_accuracy"][-1])
    assert len(three) == 3
    card = (WEIGHTS / "README.md").read_text()
    run = three[2 if name == "resnet20" else 1]  # the median, whose weights resnet20 lacks
    seed = run["config"]["seed"]
    median = 100 * three[1]["history"]["val_accuracy"][-1]
    assert name != "resnet20" or f"(seed 2, {median:.1f}%)" in card
    accuracy, trained = (100 * run["history"][key][-1] for key in ("val_accuracy", "accuracy"))
    label = ", ".join(filter(None, [rh.display_name(model), start]))
    assert f"| {label} | {accuracy:.1f} | {trained:.1f} | {seed} |" in card
    if name in ("plain20", "plain56"):
        return  # time: the residual ones are those that notebook 3 shows
    try:
        data = rh.load_data()
    except FileNotFoundError:
        pytest.skip("cats_vs_dogs is not on this machine")
    if rh.environment(data)["images_crc32"] != run["environment"]["images_crc32"]:
        pytest.skip("the images here are another copy of cats_vs_dogs")
    model = load_trained(name)
    some = rh.Batches(data.val_images[:1000], data.val_labels[:1000], 250)
    logits = model.predict(some, verbose=0)
    answers = predictions(run)
    assert np.mean(answers == data.val_labels) == pytest.approx(accuracy / 100, abs=1e-4)
    assert (logits.argmax(-1) != answers[:1000]).sum() <= 1
