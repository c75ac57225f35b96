"""Layers with weights, normalizations and pools."""

from __future__ import annotations

from .growing import Growing, Rejected, operation


def _spatial(g: Growing, v: int, *dims: int) -> tuple[int, ...]:
    """Channels and sizes of a sequence or an image."""
    shape = g.shape_of(v)
    if len(shape) - 1 not in dims:
        raise Rejected("not a sequence or image")
    return shape


def _numbers(g: Growing, dims: int, *choices: int) -> str:
    """A number, or one for each axis."""
    drawn = [g.rng.choice(choices) for _ in range(dims)]
    return str(drawn[0]) if dims == 1 or g.rng.random() < 0.5 else str(tuple(drawn))


@operation(5)
def linear(g: Growing, v: int) -> None:
    shape, out = g.shape_of(v), g.rng.randint(1, 6)
    if not shape:
        raise Rejected("no axis")
    bias = "" if g.rng.random() < 0.7 else ", bias=False"
    g.add("linear", g.layer(f"nn.Linear({shape[-1]}, {out}{bias})") + "({0})", v, linear=True)


@operation(2)
def square_linear(g: Growing, v: int) -> None:
    """Keeps the shape, so that residual connections can follow."""
    shape = g.shape_of(v)
    if not shape:
        raise Rejected("no axis")
    g.add("linear", g.layer(f"nn.Linear({shape[-1]}, {shape[-1]})") + "({0})", v, linear=True)


@operation(0.5)
def parametrized(g: Growing, v: int) -> None:
    shape = g.shape_of(v)
    kind = g.rng.choice(["weight_norm", "spectral_norm", "orthogonal"])
    if not shape:
        raise Rejected("no axis")
    made = f"nn.utils.parametrizations.{kind}(filled(nn.Linear({shape[-1]}, {g.rng.randint(1, 5)}), {g.seed()}))"
    g.add(kind, g.make(made) + "({0})", v, linear=True)


@operation(0.5)
def shared(g: Growing, v: int) -> None:
    """A layer used a second time."""
    name = g.rng.choice(list(g.made)) if g.made else ""
    if "nn." not in g.made.get(name, ""):
        raise Rejected("no layer to share")
    g.add("shared", f"self.{name}({{0}})", v, linear=True)


@operation(7)
def conv(g: Growing, v: int) -> None:
    channels, *sizes = _spatial(g, v, 1, 2)
    dims, out = len(sizes), g.rng.randint(1, 3)
    groups = g.rng.choice([n for n in (1, 2, channels) if channels % n == 0])
    text = f"nn.Conv{dims}d({channels}, {out * groups}, {_numbers(g, dims, 1, 2, 3)}"
    if g.rng.random() < 0.6:
        text += f", stride={_numbers(g, dims, 1, 2, 3)}"
        padding = _numbers(g, dims, 0, 1, 2)
    else:
        padding = g.rng.choice([_numbers(g, dims, 0, 1, 2), "'same'"])
    mode = g.rng.choice(["zeros"] * 4 + ["circular", "reflect", "replicate"])
    if g.rng.random() < 0.7:
        text += f", padding={padding}" + (f", padding_mode='{mode}'" if mode != "zeros" else "")
    if g.rng.random() < 0.2:
        text += f", dilation={_numbers(g, dims, 1, 2)}"
    if groups > 1:
        text += f", groups={groups}"
    text += "" if g.rng.random() < 0.7 else ", bias=False"
    kind = f"conv{dims}d" + (f" {mode}" if f"'{mode}'" in text else "")
    g.add(kind, g.layer(text + ")") + "({0})", v, linear=True)


@operation(1.5)
def conv_transpose(g: Growing, v: int) -> None:
    channels, *sizes = _spatial(g, v, 1, 2)
    dims, out = len(sizes), g.rng.randint(1, 2)
    groups = g.rng.choice([1, 1, channels])
    stride, dilation = g.rng.choice([1, 2, 2, 3]), g.rng.choice([1, 1, 2])
    text = f"nn.ConvTranspose{dims}d({channels}, {out * groups}, {_numbers(g, dims, 1, 2, 3)}, stride={stride}"
    text += f", padding={_numbers(g, dims, 0, 1)}, output_padding={g.rng.randint(0, max(stride, dilation) - 1)}"
    text += f", groups={groups}, dilation={dilation})"
    g.add(f"conv_transpose{dims}d", g.layer(text) + "({0})", v, linear=True)


@operation(1.5)
def batch_norm(g: Growing, v: int) -> None:
    shape = g.shape_of(v)
    if not 1 <= len(shape) <= 3:
        raise Rejected("no channels")
    dims = 2 if len(shape) == 3 else 1
    affine = "" if g.rng.random() < 0.7 else ", affine=False"
    eps = g.rng.choice(["", "", ", eps=0.1"])
    g.add("batch_norm", g.layer(f"nn.BatchNorm{dims}d({shape[0]}{affine}{eps})") + "({0})", v)


@operation(1)
def layer_norm(g: Growing, v: int) -> None:
    shape = g.shape_of(v)
    if not shape:
        raise Rejected("no axis")
    over = shape[-1:] if g.rng.random() < 0.7 else shape
    affine = "" if g.rng.random() < 0.7 else ", elementwise_affine=False"
    eps = g.rng.choice(["", ", eps=0.01", ", eps=1.0"])
    g.add("layer_norm", g.layer(f"nn.LayerNorm({over!r}{affine}{eps})") + "({0})", v)


@operation(0.4)
def other_norm(g: Growing, v: int) -> None:
    channels, *sizes = _spatial(g, v, 1, 2)
    text = g.rng.choice(["nn.GroupNorm(1, {0})", "nn.GroupNorm({0}, {0})", f"nn.InstanceNorm{len(sizes)}d({{0}})"])
    g.add(text.split("(")[0][3:].lower(), g.layer(text.format(channels)) + "({0})", v)


@operation(4)
def pool(g: Growing, v: int) -> None:
    _, *sizes = _spatial(g, v, 1, 2)
    dims, kind = len(sizes), g.rng.choice(["Avg", "Max"])
    text = f"nn.{kind}Pool{dims}d({_numbers(g, dims, 2, 3)}"
    if g.rng.random() < 0.6:
        text += f", stride={_numbers(g, dims, 1, 2, 3)}"
    if g.rng.random() < 0.4:
        text += f", padding={_numbers(g, dims, 0, 1)}"
    if g.rng.random() < 0.1:
        text += ", ceil_mode=True"
    if g.rng.random() < 0.1:
        text += ", count_include_pad=False" if kind == "Avg" else ", dilation=2"
    g.add(f"{kind.lower()}_pool{dims}d", g.make(text + ")") + "({0})", v)


@operation(0.7)
def global_pool(g: Growing, v: int) -> None:
    _, *sizes = _spatial(g, v, 1, 2)
    size = g.rng.choice([1, 1, 2])
    kind = g.rng.choice(["avg", "max"])
    g.add(f"adaptive_{kind}_pool{len(sizes)}d", f"F.adaptive_{kind}_pool{len(sizes)}d({{0}}, {size})", v)


@operation(0.4)
def resize(g: Growing, v: int) -> None:
    _spatial(g, v, 1, 2)
    code = g.rng.choice(
        ["F.interpolate({0}, scale_factor=2)", "F.pixel_shuffle({0}, 2)", "F.pixel_unshuffle({0}, 2)",
         "F.interpolate({0}, scale_factor=2, mode='bilinear')"]
    )  # fmt: skip
    g.add(code.split("(")[0][2:], code, v)


@operation(0.6)
def attention(g: Growing, v: int) -> None:
    """One head over the last two axes, with weights or without."""
    shape = g.shape_of(v)
    if len(shape) != 2:
        raise Rejected("no tokens")
    if g.rng.random() < 0.3:
        g.add("sdpa", "F.scaled_dot_product_attention({0}, {0}, {0})", v)
        return
    width = g.rng.randint(1, 3)
    query, key, value = (
        g.add("linear", g.layer(f"nn.Linear({shape[1]}, {width})", 1.0) + "({0})", v, linear=True) for _ in range(3)
    )
    scores = g.add("product of two", "{0} @ {1}.transpose(1, 2)", query, key)
    weights = g.add("softmax", f"torch.softmax({{0}} / {width**0.5:.3f}, dim=-1)", scores)
    g.add("product of two", "{0} @ {1}", weights, value)


@operation(0)
def flat_head(g: Growing, v: int) -> None:
    """The usual end: logits of all that is there."""
    size = 1
    for each in g.shape_of(v):
        size *= each
    flat = g.add("flatten", "{0}.flatten(1)", v) if len(g.shape_of(v)) > 1 else v
    if not g.shape_of(flat):
        raise Rejected("no axis")
    g.add("linear", g.layer(f"nn.Linear({size}, {g.rng.randint(2, 4)})") + "({0})", flat, linear=True)
