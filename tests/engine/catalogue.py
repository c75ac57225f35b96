"""Networks that show whether the engine's bounds of a node hold: each is about one kind of node, its subject.

A case puts its subject first, in the middle and last, alone and beside others, in the configurations that users write.
What is not here is not on the list, and this package's own operators bound it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """A network about one kind of node.

    Attributes:
        subject: Class name of the node, as in `lirpa_ext.engine.configuration.kind`.
        build: Makes the network.
        shape: Of one sample.
        alone: Only the node's own interval rule and relaxation are of interest: this package's methods read them, but
            no method of the engine is to run on such a network.
    """

    subject: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    alone: bool = False


class Apply(nn.Module):
    """A function of the input, and modules for it to use."""

    def __init__(self, function: Callable[..., Tensor], *parts: Any) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        for i, part in enumerate(part for part in parts if not isinstance(part, nn.Module)):
            self.register_buffer(f"constant_{i}", part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts, *(buffer for _, buffer in self.named_buffers(recurse=False)))


def conv_net(channels: int, size: int, *layers: nn.Module, wide: int | None = None) -> nn.Module:
    """The layers on an image of `channels` and `size`, then a dense layer of three outputs."""
    body = nn.Sequential(*layers).eval()
    with torch.no_grad():
        features = body(torch.zeros(1, channels, size, wide or size)).flatten(1).shape[1]
    return nn.Sequential(body, nn.Flatten(), nn.Linear(features, 3)).eval()


def normalized(channels: int, image: bool = True) -> nn.Module:
    """A batch norm with statistics of its own."""
    norm = (nn.BatchNorm2d if image else nn.BatchNorm1d)(channels)
    nn.init.normal_(norm.running_mean, std=0.3)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.eval()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "BoundRelu": nn.ReLU,
    "BoundLeakyRelu": lambda: nn.LeakyReLU(0.1),
    "BoundTanh": nn.Tanh,
    "BoundSigmoid": nn.Sigmoid,
    "BoundAtan": lambda: Apply(torch.atan),
    "BoundHardTanh": lambda: nn.Hardtanh(-0.5, 0.7),
}

FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "BoundClip": lambda: nn.Hardtanh(-0.5, 0.7),
    "BoundExp": lambda: Apply(torch.exp),
    "BoundAbs": lambda: Apply(torch.abs),
    "BoundSin": lambda: Apply(torch.sin),
    "BoundCos": lambda: Apply(torch.cos),
    "BoundTan": lambda: Apply(lambda x: torch.tan(0.3 * torch.tanh(x))),
    "BoundPow": lambda: Apply(lambda x: x**2),
    "BoundSqr": lambda: Apply(lambda x: x**2),
    "BoundReciprocal": lambda: Apply(lambda x: 1 / (x.abs() + 0.5)),
    "BoundSign": lambda: Apply(torch.sign),
    "BoundFloor": lambda: Apply(torch.floor),
}


def _around(kind: str, make: Callable[[], nn.Module]) -> list[Case]:
    """An activation: first, after a dense layer, after a convolution, twice, last, on sequences, of large values."""
    return [
        Case(kind, lambda: nn.Sequential(nn.Linear(4, 5), Apply(lambda x: 1e6 * x), make(), nn.Linear(5, 3)), (4,)),
        Case(kind, lambda: nn.Sequential(make(), nn.Linear(4, 3)), (4,)),
        Case(kind, lambda: nn.Sequential(nn.Linear(4, 5), make(), nn.Linear(5, 5), make(), nn.Linear(5, 3)), (4,)),
        Case(kind, lambda: nn.Sequential(nn.Linear(4, 3), make()), (4,)),
        Case(kind, lambda: conv_net(2, 4, nn.Conv2d(2, 3, 3, 1, 1), make(), nn.Conv2d(3, 2, 3, 2, 1), make()), (2, 4, 4)),
        Case(kind, lambda: conv_net(2, 4, make(), nn.Conv2d(2, 2, 2)), (2, 4, 4)),
        Case(kind, lambda: nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(6, 2)), (3, 3)),
    ]  # fmt: skip


def _convolutions() -> list[Case]:
    """Chains of convolutions: kernels, strides, paddings, groups, dilations, on square maps and others."""
    cases = []
    for kernel, stride, padding, extra in (
        (3, 1, 1, {}), (3, 1, 0, {}), (2, 2, 0, {}), (3, 2, 1, {}), (4, 2, 1, {}), (5, 2, 2, {}), (1, 1, 0, {}),
        (2, 1, 1, {}), (3, 3, 1, {}), (1, 2, 0, {}), (3, 1, 1, {"bias": False}), (3, 1, 2, {"dilation": 2}),
        (3, 1, 1, {"groups": 2}), (3, 2, 1, {"groups": 2}),
    ):  # fmt: skip
        for size in (6, 7):

            def build(kernel: int = kernel, stride: int = stride, padding: int = padding, extra: Any = extra, size: int = size) -> nn.Module:  # fmt: skip
                layers = [nn.Conv2d(2, 4, kernel, stride, padding, **extra), nn.ReLU(), nn.Conv2d(4, 4, kernel, 1, 1, **extra)]  # fmt: skip
                return conv_net(2, size, *layers, nn.ReLU())

            def first(kernel: int = kernel, stride: int = stride, padding: int = padding, extra: Any = extra, size: int = size) -> nn.Module:  # fmt: skip
                layers = [nn.Conv2d(2, 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(2, 4, kernel, stride, padding, **extra), nn.Tanh()]  # fmt: skip
                return conv_net(2, size, *layers)

            cases += [Case("BoundConv", build, (2, size, size)), Case("BoundConv", first, (2, size, size))]
    oblong = lambda: conv_net(1, 5, nn.Conv2d(1, 2, 3, 1, 1), nn.Tanh(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU(), wide=6)
    window = lambda: conv_net(1, 6, nn.Conv2d(1, 2, (3, 1), (1, 2), (1, 0)), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU())
    line = lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv1d(3, 2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))  # fmt: skip
    cases += [
        Case("BoundConv", oblong, (1, 5, 6)),
        Case("BoundConv", window, (1, 6, 6)),
        Case("BoundConv", line, (2, 6)),
    ]
    return cases


def _residual(x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
    return torch.relu(x + g(torch.relu(f(x))))


def _shapes() -> list[Case]:
    """What moves and joins values."""
    conv = lambda i, o, s=1: nn.Conv2d(i, o, 3, s, 1)
    vector = lambda: torch.randn(1, 4)
    channels = lambda: torch.rand(1, 2, 1, 1) + 0.5
    return [
        Case("BoundLinear", lambda: nn.Linear(4, 3), (4,)),
        Case("BoundLinear", lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3)), (4,)),
        Case("BoundLinear", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), (4,)),
        Case("BoundLinear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3)), (2, 4)),
        Case("BoundLinear", lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3), nn.ReLU()), (4,)),
        Case("BoundLinear", lambda: nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 1)), (4,)),
        Case("BoundMatMul", lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Flatten()), (2, 3)),
        Case("BoundMatMul", lambda: Apply(lambda x, f: f(x @ x.transpose(1, 2)), nn.Flatten()), (2, 3)),
        Case("BoundFlatten", lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), (2, 4)),
        Case("BoundFlatten", lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), (2, 2, 2)),
        Case("BoundFlatten", lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)), (2, 1, 5)),
        Case("BoundPerturbedInput", lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)), (2, 1, 5)),
        Case("BoundPerturbedInput", lambda: conv_net(2, 4, Apply(lambda x: x * 2.0 - 0.1), conv(2, 3), nn.ReLU(), wide=5), (2, 4, 5)),
        Case("BoundReshape", lambda: nn.Sequential(Apply(lambda x: x.reshape(x.shape[0], -1)), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)), (2, 1, 5)),
        Case("BoundFlatten", lambda: conv_net(2, 4, conv(2, 3), nn.ReLU()), (2, 4, 4)),
        Case("BoundFlatten", lambda: conv_net(2, 5, nn.Conv2d(2, 1, 2, 2), nn.ReLU()), (2, 5, 5)),
        Case("BoundReshape", lambda: nn.Sequential(conv(2, 2), nn.ReLU(), Apply(lambda x: x.reshape(x.shape[0], -1)), nn.Linear(32, 2)), (2, 4, 4)),
        Case("BoundReshape", lambda: nn.Sequential(Apply(lambda x: x.view(-1, 8)), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)), (2, 4)),
        Case("BoundReshape", lambda: nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), conv(2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (4,)),
        Case("BoundAdd", lambda: Apply(_residual, nn.Linear(4, 5), nn.Linear(5, 4)), (4,)),
        Case("BoundAdd", lambda: nn.Sequential(nn.Linear(4, 4), Apply(_residual, nn.Linear(4, 5), nn.Linear(5, 4)), nn.Linear(4, 2)), (4,)),
        Case("BoundAdd", lambda: conv_net(2, 4, conv(2, 2), nn.ReLU(), Apply(_residual, conv(2, 3), conv(3, 2)), conv(2, 2, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundAdd", lambda: conv_net(2, 4, Apply(lambda x, f, g: torch.relu(f(x) + g(x)), conv(2, 3, 2), nn.Conv2d(2, 3, 1, 2)), conv(3, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundAdd", lambda: nn.Sequential(nn.Linear(4, 4), Apply(lambda x, c: torch.relu(x + c), vector()), nn.Linear(4, 2)), (4,)),
        Case("BoundAdd", lambda: nn.Sequential(Apply(lambda x, c: x + c, vector()), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundAdd", lambda: conv_net(2, 4, conv(2, 2), Apply(lambda x, c: torch.relu(x + c), channels()), conv(2, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundAdd", lambda: Apply(lambda x, f, g: g(torch.relu(f(x)) + x[:, :1]), nn.Linear(4, 4), nn.Linear(4, 2)), (4,)),
        Case("BoundSub", lambda: Apply(lambda x, f, g: torch.relu(x - g(torch.relu(f(x)))), nn.Linear(4, 5), nn.Linear(5, 4)), (4,)),
        Case("BoundSub", lambda: conv_net(2, 4, Apply(lambda x, f, g: torch.relu(f(x) - g(x)), conv(2, 3), conv(2, 3)), conv(3, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundSub", lambda: nn.Sequential(Apply(lambda x, c: x - c, vector()), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundSub", lambda: nn.Sequential(Apply(lambda x, c: x - c, torch.randn(1, 1, 1, 5)), nn.Flatten(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), (1, 1, 5)),
        Case("BoundDiv", lambda: nn.Sequential(Apply(lambda x, c: x / c, torch.rand(1, 1, 1, 5) + 0.5), nn.Flatten(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), (1, 1, 5)),
        Case("BoundSub", lambda: nn.Sequential(Apply(lambda x, c: c - x, vector()), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundSub", lambda: conv_net(2, 4, Apply(lambda x, c: x - c, channels()), conv(2, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundMul", lambda: nn.Sequential(Apply(lambda x, c: x * c, vector()), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundMul", lambda: conv_net(2, 4, conv(2, 2), Apply(lambda x, c: torch.relu(x * c), channels()), conv(2, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundMul", lambda: Apply(lambda x, f, g, h: h(f(x) * torch.sigmoid(g(x))), nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)), (4,)),
        Case("BoundMul", lambda: Apply(lambda x, f, g: g(f(x) * f(x)), nn.Linear(4, 5), nn.Linear(5, 2)), (4,)),
        Case("BoundMul", lambda: conv_net(2, 4, Apply(lambda x, f, g: f(x) * g(x), conv(2, 2), conv(2, 2))), (2, 4, 4)),
        Case("BoundMul", lambda: Apply(lambda x, f, g: g(f(x) * f(x)[:, :1]), nn.Linear(4, 5), nn.Linear(5, 2)), (4,)),
        Case("BoundDiv", lambda: nn.Sequential(Apply(lambda x, c: x / (c.abs() + 0.5), vector()), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundDiv", lambda: conv_net(2, 4, Apply(lambda x, c: (x - 0.2) / c, channels()), conv(2, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundNeg", lambda: nn.Sequential(Apply(lambda x: -x), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
        Case("BoundNeg", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Apply(lambda x: -x), nn.Linear(5, 2)), (4,)),
        Case("BoundConcat", lambda: Apply(lambda x, f, g: g(torch.cat([x, torch.relu(f(x))], 1)), nn.Linear(4, 3), nn.Linear(7, 2)), (4,)),
        Case("BoundConcat", lambda: conv_net(2, 4, Apply(lambda x, f: torch.cat([x, torch.relu(f(x))], 1), conv(2, 2)), conv(4, 2), nn.ReLU()), (2, 4, 4)),
        Case("BoundSlice", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Apply(lambda x: x[:, 1:4]), nn.Linear(3, 2)), (4,)),
        Case("BoundTranspose", lambda: nn.Sequential(Apply(lambda x: x.transpose(1, 2)), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)), (2, 4)),
        Case("BoundBatchNormalization", lambda: conv_net(2, 4, conv(2, 3), normalized(3), nn.ReLU(), conv(3, 2, 2), normalized(2), nn.ReLU()), (2, 4, 4)),
        Case("BoundBatchNormalization", lambda: conv_net(2, 4, normalized(2), conv(2, 3), nn.ReLU()), (2, 4, 4)),
        Case("BoundBatchNormalization", lambda: nn.Sequential(nn.Linear(4, 5), normalized(5, False), nn.ReLU(), nn.Linear(5, 2)).eval(), (4,)),
        Case("BoundDropout", lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)).eval(), (4,)),
        Case("BoundReduceMean", lambda: conv_net(2, 4, conv(2, 3), nn.ReLU(), Apply(lambda x: x.mean((2, 3)))), (2, 4, 4)),
        Case("BoundReduceSum", lambda: conv_net(2, 4, conv(2, 3), nn.ReLU(), Apply(lambda x: x.sum((2, 3)))), (2, 4, 4)),
        Case("BoundReduceMax", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Apply(lambda x: torch.amax(x, 1, True)), nn.Linear(1, 2)), (4,)),
        Case("BoundReduceMin", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Apply(lambda x: torch.amin(x, 1, True)), nn.Linear(1, 2)), (4,)),
        Case("BoundGlobalAveragePool", lambda: conv_net(2, 4, conv(2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (2, 4, 4)),
        Case("BoundMax", lambda: Apply(lambda x, f, g, h: h(torch.maximum(f(x), g(x))), nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)), (4,)),
        Case("BoundMin", lambda: Apply(lambda x, f, g, h: h(torch.minimum(f(x), g(x))), nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)), (4,)),
        Case("BoundWhere", lambda: nn.Sequential(nn.Linear(4, 5), Apply(lambda x, c: torch.where(c > 0, x, -x), torch.randn(1, 5)), nn.Linear(5, 2)), (4,)),
        Case("BoundGatherElements", lambda: nn.Sequential(nn.Linear(4, 4), Apply(lambda x: torch.gather(x, 1, torch.zeros_like(x).long())), nn.Linear(4, 2)), (4,)),
        Case("BoundResize", lambda: conv_net(2, 3, conv(2, 2), nn.ReLU(), nn.Upsample(scale_factor=2)), (2, 3, 3)),
        Case("BoundConvTranspose", lambda: conv_net(2, 3, nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU()), (2, 3, 3)),
    ]  # fmt: skip


def _pools() -> list[Case]:
    """Average and max pools: tiles, overlaps, gaps, padding, and maps that the windows do not fill."""
    cases = []
    for kernel, stride, padding in ((2, 2, 0), (3, 3, 0), (2, 1, 0), (3, 2, 0), (2, 3, 0), (2, 2, 1), (3, 2, 1)):
        for size in (4, 6, 7):
            for kind, pool in (("BoundAveragePool", nn.AvgPool2d), ("BoundMaxPool", nn.MaxPool2d)):

                def build(pool: Any = pool, kernel: int = kernel, stride: int = stride, padding: int = padding, size: int = size) -> nn.Module:  # fmt: skip
                    return conv_net(2, size, nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), pool(kernel, stride, padding))

                def later(pool: Any = pool, kernel: int = kernel, stride: int = stride, padding: int = padding, size: int = size) -> nn.Module:  # fmt: skip
                    return conv_net(2, size, pool(kernel, stride, padding), nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU())

                cases += [Case(kind, build, (2, size, size)), Case(kind, later, (2, size, size))]
    return cases


_ALONE = ("BoundMatMul", "BoundReduceMax", "BoundReduceMin", "BoundMax", "BoundMin", "BoundWhere", "BoundGatherElements",
          "BoundResize", "BoundConvTranspose", "BoundReduceSum", "BoundReduceMean")  # fmt: skip


def catalogue() -> list[Case]:
    """All cases."""
    activations = [case for kind, make in ACTIVATIONS.items() for case in _around(kind, make)]
    functions = [case._replace(alone=True) for kind, make in FUNCTIONS.items() for case in _around(kind, make)[1::2]]
    shapes = [case._replace(alone=case.subject in _ALONE) for case in _shapes()]
    inputs = [Case("BoundPerturbedInput", case.build, case.shape) for case in [*activations[:6], *_convolutions()[:4]]]
    return [*activations, *functions, *shapes, *_pools(), *_convolutions(), *inputs]
