"""The paper's nets in PyTorch and torchvision's conventions; no code shared with the helper."""

import torch
from torch import nn

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
SMALL = {20: (3, 3, 3), 32: (5, 5, 5), 56: (9, 9, 9)}  # section 4.2


class ConvBN(nn.Sequential):
    def __init__(self, inputs, outputs, kernel, stride=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=1e-5))


class Unit(nn.Module):
    def __init__(self, inputs, width, stride, bottleneck, shortcut, v15):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.stride, self.missing, self.shortcut, self.projection = (
            stride,
            outputs - inputs,
            shortcut,
            None,
        )
        if bottleneck:
            first, second = (1, stride) if v15 else (stride, 1)
            self.branch = nn.ModuleList(
                [
                    ConvBN(inputs, width, 1, first),
                    ConvBN(width, width, 3, second),
                    ConvBN(width, outputs, 1),
                ]
            )
        else:
            self.branch = nn.ModuleList(
                [ConvBN(inputs, outputs, 3, stride), ConvBN(outputs, outputs, 3)]
            )
        changes = stride > 1 or inputs != outputs
        if shortcut == "projection_all" or (shortcut == "projection" and changes):
            self.projection = ConvBN(inputs, outputs, 1, stride)

    def forward(self, x):
        y = x
        for layer in self.branch[:-1]:
            y = torch.relu(layer(y))
        y = self.branch[-1](y)
        if self.projection is not None:
            y = y + self.projection(x)
        elif self.shortcut == "zero_pad":
            x = nn.functional.avg_pool2d(x, 1, self.stride)
            y = y + torch.cat([x, x.new_zeros(len(x), self.missing, *x.shape[2:])], dim=1)
        elif self.shortcut != "none":
            y = y + x
        return torch.relu(y)


class Net(nn.Module):
    """`shortcut` "none" makes a plain net; `v15` strides in the 3x3 of a bottleneck."""

    def __init__(self, depth, classes, shortcut, v15=False, cifar_stem=False):
        super().__init__()
        width, cifar_stem = 16 if depth in SMALL else 64, cifar_stem or depth in SMALL
        self.stem = ConvBN(3, width, 3) if cifar_stem else ConvBN(3, width, 7, 2)
        self.pool = nn.Identity() if cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        self.units, inputs, bottleneck = nn.ModuleDict(), width, depth == 50
        for stage, count in enumerate({**UNITS, **SMALL}[depth]):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                unit = Unit(inputs, width << stage, stride, bottleneck, shortcut, v15)
                self.units[f"conv{stage + 2}_block{i + 1}"], inputs = (
                    unit,
                    unit.branch[-1][0].out_channels,
                )
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        for unit in self.units.values():
            x = unit(x)
        return self.fc(x.mean(dim=(2, 3)))

    @torch.no_grad()
    def load(self, weights):
        """Take weights, {layer name: arrays} in Keras's order and layout; each must be used."""
        pairs = {"conv1": self.stem}
        for name, unit in self.units.items():
            pairs |= {f"{name}_{i}": pair for i, pair in enumerate(unit.branch, 1)}
            pairs |= {f"{name}_0": unit.projection} if unit.projection is not None else {}
        targets = {"predictions": [self.fc.weight, self.fc.bias]}
        for name, (conv, bn) in pairs.items():
            targets[f"{name}_conv"] = [conv.weight]
            targets[f"{name}_bn"] = [bn.weight, bn.bias, bn.running_mean, bn.running_var]
        assert targets.keys() == weights.keys()
        for name, tensors in targets.items():
            for tensor, array in zip(tensors, weights[name], strict=True):
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
                array = torch.tensor(array.transpose(order))
                assert tensor.shape == array.shape, name
                tensor.copy_(array)
