"""Functions of one number, of one axis, and reductions."""

from __future__ import annotations

from .growing import Growing, Rejected, operation

# Those of any argument; a number that follows the name keeps statistics of two forms apart.
COMMON = {
    "relu": "torch.relu({0})",
    "leaky_relu": "F.leaky_relu({0}, 0.1)",
    "tanh": "torch.tanh({0})",
    "sigmoid": "torch.sigmoid({0})",
    "gelu": "F.gelu({0})",
    "silu": "F.silu({0})",
    "elu": "F.elu({0})",
    "softplus": "F.softplus({0})",
    "hardtanh": "F.hardtanh({0}, -0.5, 0.7)",
    "abs": "{0}.abs()",
}
RARE = {
    "leaky_relu steep": "F.leaky_relu({0}, 0.9)",
    "leaky_relu of other slope": "F.leaky_relu({0}, 1.5)",
    "elu 0.5": "F.elu({0}, 0.5)",
    "elu 2": "F.elu({0}, 2.0)",
    "selu": "F.selu({0})",
    "celu": "F.celu({0})",
    "celu 2": "F.celu({0}, 2.0)",
    "gelu tanh": "F.gelu({0}, approximate='tanh')",
    "mish": "F.mish({0})",
    "relu6": "F.relu6({0})",
    "hardsigmoid": "F.hardsigmoid({0})",
    "hardswish": "F.hardswish({0})",
    "softplus beta": "F.softplus({0}, beta=3.0, threshold=5.0)",
    "logsigmoid": "F.logsigmoid({0})",
    "softsign": "F.softsign({0})",
    "tanhshrink": "F.tanhshrink({0})",
    "softshrink": "F.softshrink({0})",
    "hardshrink": "F.hardshrink({0})",
    "threshold": "F.threshold({0}, 0.1, 0.1)",
    "atan": "torch.atan({0})",
    "erf": "torch.erf({0})",
    "sin": "torch.sin({0})",
    "cos": "torch.cos({0})",
    "tan": "torch.tan(0.5 * torch.tanh({0}))",
    "exp": "torch.exp({0})",
    "expm1": "torch.expm1({0})",
    "square": "{0} ** 2",
    "square by product": "{0} * {0}",
    "cube": "{0} ** 3",
    "fourth power": "{0} ** 4",
    "clamp": "{0}.clamp(-0.4, 0.6)",
    "clamp min": "{0}.clamp(min=-0.3)",
    "clamp max": "{0}.clamp(max=0.4)",
    "clamp min 0": "{0}.clamp(min=0.0)",
    "maximum with number": "torch.maximum({0}, torch.zeros_like({0}))",
    "sign": "torch.sign({0})",
    "floor": "torch.floor({0})",
    "where": "torch.where({0} > 0, {0}, 0.2 * {0})",
    "negative": "-{0}",
    "identity": "nn.Identity()({0})",
    "dropout": "F.dropout({0}, 0.5, False)",
}
# Those of positive arguments.
POSITIVE = {
    "sqrt": "torch.sqrt({0})",
    "log": "torch.log({0})",
    "log1p": "torch.log1p({0})",
    "reciprocal": "1 / {0}",
    "reciprocal function": "torch.reciprocal({0})",
    "rsqrt": "torch.rsqrt({0})",
    "power 0.5": "{0} ** 0.5",
    "power 1.5": "{0} ** 1.5",
    "power -1": "{0} ** -1",
    "power -2": "{0} ** -2",
    "number over": "0.7 / {0}",
}


@operation(6)
def activation(g: Growing, v: int) -> None:
    kind = g.rng.choice(list(COMMON))
    g.add(kind, COMMON[kind], v)


@operation(4)
def rare_activation(g: Growing, v: int) -> None:
    kind = g.rng.choice(list(RARE))
    g.add(kind, RARE[kind], v)


@operation(0.4)
def prelu(g: Growing, v: int) -> None:
    shape = g.shape_of(v)
    count = g.rng.choice([1, shape[0]]) if shape else 1
    made = g.make(f"nn.PReLU({count}, init={g.rng.choice([0.25, 0.9, -0.5])})")
    g.add("prelu", made + "({0})", v)


def positive(g: Growing, v: int) -> int:
    """A value made positive."""
    away = g.rng.choice([0.1, 0.5, 1e-3])
    code = g.rng.choice(
        ["{0}.abs() + %g", "torch.relu({0}) + %g", "torch.sigmoid({0}) + %g", "{0} ** 2 + %g", "F.softplus({0}) + %g",
         "torch.tanh({0}) + 1 + %g"]
    )  # fmt: skip
    return g.add("positive", code % away, v)


@operation(2)
def of_positive(g: Growing, v: int) -> None:
    kind = g.rng.choice(list(POSITIVE))
    g.add(kind, POSITIVE[kind], positive(g, v))


def _axis(g: Growing, v: int) -> int:
    """An axis that is not the batch's, as a number from the front or from the back."""
    rank = len(g.shape_of(v))
    if not rank:
        raise Rejected("no axis")
    axis = g.rng.randint(1, rank)
    return axis if g.rng.random() < 0.6 else axis - rank - 1


@operation(1)
def softmax(g: Growing, v: int) -> None:
    kind = g.rng.choice(["softmax", "log_softmax"])
    g.add(kind, f"F.{kind}({{0}}, dim={_axis(g, v)})", v)


@operation(2)
def reduction(g: Growing, v: int) -> None:
    kind = g.rng.choice(["sum", "mean", "amax", "amin", "max", "min", "logsumexp", "prod"])
    keep = g.rng.random() < 0.5
    axis: object = _axis(g, v)
    if kind in ("sum", "mean", "amax", "amin", "logsumexp") and len(g.shape_of(v)) > 1 and g.rng.random() < 0.3:
        axis = tuple(g.rng.sample(range(1, len(g.shape_of(v)) + 1), 2))
    tail = "[0]" if kind in ("max", "min") else ""
    g.add(kind, f"{{0}}.{kind}(dim={axis}, keepdim={keep}){tail}", v)


@operation(0.7)
def norm(g: Growing, v: int) -> None:
    axis = _axis(g, v)
    kind, code = g.rng.choice(
        [
            ("norm", f"torch.norm({{0}}, dim={axis}, keepdim=True)"),
            ("norm 1", f"torch.norm({{0}}, p=1, dim={axis}, keepdim=True)"),
            ("vector_norm", f"torch.linalg.vector_norm({{0}}, dim={axis}, keepdim=True)"),
            ("normalize", f"F.normalize({{0}}, dim={axis})"),
            ("norm by hand", f"torch.sqrt(({{0}} ** 2).sum({axis}, keepdim=True) + 0.01)"),
            ("glu", f"F.glu({{0}}, {axis})"),
        ]
    )
    g.add(kind, code, v)


@operation(0.7)
def along(g: Growing, v: int) -> None:
    axis = _axis(g, v)
    kind, code = g.rng.choice(
        [("cumsum", f"{{0}}.cumsum({axis})"), ("sort", f"{{0}}.sort({axis})[0]"), ("flip", f"{{0}}.flip({axis})"),
         ("roll", f"{{0}}.roll(1, {axis})"), ("topk", f"{{0}}.topk(1, {axis})[0]")]
    )  # fmt: skip
    g.add(kind, code, v)


@operation(0.3)
def min_max(g: Growing, v: int) -> None:
    """Pairs sorted: chunks along the channels, or neighbours."""
    shape = g.shape_of(v)
    if not shape or shape[0] % 2:
        raise Rejected("an odd number of channels")
    low, high = f"{{0}}[:, :{shape[0] // 2}]", f"{{0}}[:, {shape[0] // 2}:]"
    code = f"torch.cat([torch.maximum({low}, {high}), torch.minimum({low}, {high})], 1)"
    if len(shape) == 1 and g.rng.random() < 0.5:
        code = f"{{0}}.view(-1, {shape[0] // 2}, 2).sort(2)[0].flatten(1)"
    g.add("min_max", code, v)


@operation(0.15)
def across_samples(g: Growing, v: int) -> None:
    """Samples that read each other: to be refused when the graph is built."""
    kind, code = g.rng.choice(
        [
            ("flip over samples", "{0}.flip(0)"),
            ("roll over samples", "{0}.roll(1, 0)"),
            ("cumsum over samples", "{0}.cumsum(0)"),
            ("softmax over samples", "torch.softmax({0}, 0)"),
            ("less the mean of samples", "{0} - {0}.mean(0, keepdim=True)"),
            ("less the first sample", "{0} - {0}[:1]"),
            ("greatest of samples", "{0} - 0.1 * {0}.max(0, keepdim=True)[0]"),
            ("sort over samples", "{0}.sort(0)[0]"),
        ]
    )
    g.add(kind, code, v, mixes=True)
