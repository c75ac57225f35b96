"""Constants, joins of two values, and what moves entries about."""

from __future__ import annotations

from .growing import Growing, Rejected, operation
from .pointwise import positive
from .program import Shape


def _broadcast(g: Growing, shape: Shape) -> Shape:
    """A shape that broadcasts with (B, *shape) and leaves it as it is."""
    rank = g.rng.randint(0, len(shape))
    kept = [size if g.rng.random() < 0.7 else 1 for size in shape[len(shape) - rank :]]
    return tuple([1] * (g.rng.random() < 0.5) * (rank == len(shape)) + kept) or (1,)


@operation(3)
def arithmetic(g: Growing, v: int) -> None:
    """With a number, a tensor or a product of tensors."""
    shape = g.shape_of(v)
    kind = g.rng.choice(["+", "-", "*", "/", "minus from", "number *", "number +", "layer scale", "shift of product"])
    if kind in ("+", "-", "*"):
        g.add(f"{kind} constant", f"{{0}} {kind} {g.constant(_broadcast(g, shape))}", v)
    elif kind == "minus from":
        g.add("constant -", f"{g.constant(_broadcast(g, shape))} - {{0}}", v)
    elif kind == "/":
        g.add("/ constant", f"{{0}} / ({g.constant(_broadcast(g, shape))}.abs() + 0.3)", v)
    elif kind == "number *":
        g.add("number *", g.rng.choice(["{0} * 0.5", "-1.5 * {0}", "{0} / 3", "{0} * 1e-3", "{0} * 1e3"]), v)
    elif kind == "number +":
        g.add("number +", g.rng.choice(["{0} + 0.25", "1 - {0}", "({0} - 0.45) / 0.25"]), v)
    elif kind == "layer scale":
        a, b = (g.constant(shape[-1:] or (1,), 1.0, True) for _ in range(2))
        g.add("product of parameters *", f"{{0}} * ({a} * {b})", v)
    else:
        a, b = (g.constant(shape[-1:] or (1,), 1.0, True) for _ in range(2))
        g.add("+ product of parameters", f"{{0}} + {a} * {b}", v)


@operation(1.2)
def matmul(g: Growing, v: int) -> None:
    """A constant matrix or vector on either side; weights computed from parameters."""
    shape, out = g.shape_of(v), g.rng.randint(1, 4)
    if not shape:
        raise Rejected("no axis")
    side = g.rng.choice(["right", "left", "left vector", "right vector", "computed weight", "einsum"])
    if side == "right":
        g.add("@ constant", f"{{0}} @ {g.constant((shape[-1], out))}", v, linear=True)
    elif side == "right vector":
        g.add("@ vector", f"{{0}} @ {g.constant((shape[-1],))}", v, linear=True)
    elif side == "computed weight":
        a = g.constant((out, shape[-1]), None, True)
        g.add("linear with computed weight", f"F.linear({{0}}, {a} * 0.3)", v, linear=True)
    elif len(shape) < 2:
        raise Rejected("a matrix on the left needs two axes")
    elif side == "left":
        g.add("constant @", f"{g.constant((out, shape[-2]))} @ {{0}}", v, linear=True)
    elif side == "left vector":
        g.add("vector @", f"{g.constant((shape[-2],))} @ {{0}}", v, linear=True)
    elif len(shape) == 2:
        g.add("einsum", f"torch.einsum('btf,fo->bto', {{0}}, {g.constant((shape[-1], out))})", v, linear=True)


@operation(5)
def join(g: Growing, v: int) -> None:
    """Two values of one shape."""
    other = g.like(v)
    if other is None:
        raise Rejected("nothing to join with")
    kinds = ["+", "+", "+", "-", "-", "*", "/", "maximum", "minimum", "cat", "stack", "gate", "where"]
    kind = g.rng.choice(kinds)
    shape = g.shape_of(v)
    if kind in ("+", "-", "*"):
        g.add(f"two: {kind}", f"{{0}} {kind} {{1}}", v, other)
    elif kind == "/":
        g.add("two: /", "{0} / {1}", v, positive(g, other))
    elif kind in ("maximum", "minimum"):
        g.add(f"two: {kind}", f"torch.{kind}({{0}}, {{1}})", v, other)
    elif kind == "gate":
        g.add("gate", "{0} * torch.sigmoid({1})", v, other)
    elif kind == "where":
        g.add("two: where", "torch.where({0} > 0, {1}, {0})", v, other)
    elif kind == "cat" and shape:
        g.add("cat", f"torch.cat([{{0}}, {{1}}], {g.rng.choice([1, -1])})", v, other)
    else:
        g.add("stack", f"torch.stack([{{0}}, {{1}}], {g.rng.choice([1, -1])})", v, other)


@operation(1)
def dense_connection(g: Growing, v: int) -> None:
    """Concatenation of values that differ along the channels."""
    shape = g.shape_of(v)
    others = [
        other
        for other in g.found
        if other != v and len(g.shape_of(other)) == len(shape) and g.shape_of(other)[1:] == shape[1:]
    ]
    if not others or not shape:
        raise Rejected("nothing to concatenate")
    g.add("cat", "torch.cat([{0}, {1}], 1)", g.rng.choice(others), v)


@operation(0.7)
def product_of_axes(g: Growing, v: int) -> None:
    """Two parts of one value multiplied, or a broadcast between them."""
    shape = g.shape_of(v)
    if not shape or shape[0] < 2:
        raise Rejected("one entry")
    code = g.rng.choice(
        ["{0}[:, :1] * {0}[:, 1:]", "{0}[:, 0] * {0}[:, -1]", "{0} * {0}.mean(1, keepdim=True)",
         "{0} - {0}.mean(1, keepdim=True)", "{0} - {0}.amax(1, keepdim=True)", "{0} @ {0}.transpose(-1, -2)"]
    )  # fmt: skip
    if "@" in code and len(shape) != 2:
        raise Rejected("no matrix")
    g.add("parts joined", code, v)


@operation(0.6)
def zeros(g: Growing, v: int) -> None:
    """A branch whose batch comes from the shape of the input."""
    shape = g.shape_of(v)
    if not shape:
        raise Rejected("no axis")
    made = g.layer(f"nn.Linear({shape[-1]}, {g.rng.randint(1, 4)})", 1.0)
    code = g.rng.choice(
        [f"{made}({{0}}) - {made}(torch.zeros_like({{0}}))", f"{made}({{0}}) + {made}(torch.ones_like({{0}}))",
         "torch.cat([{0}, torch.zeros_like({0})], 1)", "{0} - torch.full_like({0}, 0.3)",
         f"torch.cat([{g.constant((1, *shape))}.expand({{0}}.shape[0], {', '.join(['-1'] * len(shape))}), {{0}}], 1)"]
    )  # fmt: skip
    g.add("batch from shape", code, v)


@operation(3)
def move(g: Growing, v: int) -> None:
    """What moves, drops or copies entries."""
    shape = g.shape_of(v)
    rank = len(shape)
    if not rank:
        raise Rejected("no axis")
    axis = g.rng.randint(1, rank)
    size = shape[axis - 1]
    here = ", ".join([":"] * axis)
    total = 1
    for each in shape:
        total *= each
    index = [g.rng.randrange(size) for _ in range(g.rng.randint(1, 3))]
    signed = axis if g.rng.random() < 0.6 else axis - rank - 1
    codes = {
        "slice": f"{{0}}[{here}, {g.rng.choice(['1:', ':-1', '::2', ':1', '-2:'])}]",
        "select": f"{{0}}[{here}, {g.rng.choice([0, -1])}]",
        "narrow": f"{{0}}.narrow({signed}, {size // 2}, {size - size // 2})",
        "index_select": f"{{0}}.index_select({axis}, torch.tensor({index}))",
        "index": f"{{0}}[{here}, {index}]",
        "pad": f"F.pad({{0}}, {g.rng.choice([(1, 0), (0, 2), (1, 1)])})",
        "pad value": f"F.pad({{0}}, (1, 1), value={g.rng.choice([0.3, -1.0])})",
        "pad negative": "F.pad({0}, (-1, 1))",
        "pad mode": f"F.pad({{0}}, (1, 1), mode='{g.rng.choice(['reflect', 'replicate', 'circular'])}')",
        "flatten": "{0}.flatten(1)",
        "reshape": f"{{0}}.reshape({{0}}.shape[0], -1, {g.rng.choice([n for n in (1, 2, 3) if total % n == 0])})",
        "view": f"{{0}}.reshape(-1, {total})",
        "unflatten": f"{{0}}.unflatten({axis}, (-1, {g.rng.choice([n for n in (1, 2) if size % n == 0])}))",
        "transpose": "{0}.transpose(1, -1)",
        "unsqueeze": f"{{0}}.unsqueeze({g.rng.choice([1, -1])})",
        "squeeze": f"{{0}}.squeeze({g.rng.choice([1, -1])})",
        "repeat": f"{{0}}.repeat({', '.join(['1'] + [str(g.rng.choice([1, 2])) for _ in shape])})",
        "repeat_interleave": f"{{0}}.repeat_interleave(2, {axis})",
        "expand": f"{{0}}.unsqueeze(1).expand(-1, 2, {', '.join(['-1'] * rank)})",
        "split": f"{{0}}.split({max(1, size // 2)}, {signed})[-1]",
        "chunk": f"{{0}}.chunk(2, {signed})[{g.rng.choice([0, -1])}]",
        "unbind": f"{{0}}.unbind({axis})[0]",
        "chunks joined": f"{{0}}.chunk(2, {axis})[0] + {{0}}.chunk(2, {axis})[-1]",
    }
    if rank >= 2:
        order = list(range(1, rank + 1))
        g.rng.shuffle(order)
        codes["permute"] = f"{{0}}.permute(0, {', '.join(map(str, order))})"
        codes["gather"] = f"torch.gather({{0}}, {axis}, torch.zeros_like({{0}}, dtype=torch.long))"
    kind = g.rng.choice(list(codes))
    g.add(kind, codes[kind], v)


@operation(0.6)
def merged_batch(g: Growing, v: int) -> None:
    """A layer applied to parts of a sample: the batch axis is merged with another one, and split again."""
    shape = g.shape_of(v)
    if not shape:
        raise Rejected("no axis")
    parts = g.rng.choice([n for n in (1, 2, 3) if shape[-1] % n == 0]) if len(shape) == 1 else shape[0]
    size = shape[-1] // parts if len(shape) == 1 else shape[-1]
    if len(shape) > 2:
        raise Rejected("too many axes")
    layer = g.layer(f"nn.Linear({size}, {g.rng.randint(1, 3)})", 1.0)
    code = f"{layer}({{0}}.reshape(-1, {size})).reshape({{0}}.shape[0], {parts}, -1)"
    g.add("merged batch axis", code + g.rng.choice(["", ".flatten(1)", ".sum(1)"]), v, linear=True)
