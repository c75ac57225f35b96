"""Random cases: the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from dataclasses import replace

from . import layers, pointwise, structure  # noqa: F401  (they fill the table of operations)
from .case import OURS, Ball, Call, Case, execute, program
from .growing import OPERATIONS, Growing, grow
from .program import Network, Shape

SHAPES: tuple[Shape, ...] = (
    (2,), (3,), (4,), (5,), (6,), (3, 4), (2, 5), (4, 2), (1, 4, 4), (2, 3, 4), (1, 5, 3), (3, 4, 2), (1, 6, 6),
)  # fmt: skip
ENGINES = (
    "IBP", "CROWN-IBP", "CROWN", "alpha-CROWN", "IBP+backward", "forward", "forward+backward", "dynamic-forward",
    "dynamic-forward+backward", "forward-optimized",
)  # fmt: skip
_FEW_STEPS = "{'optimize_bound_args': {'iteration': 3}}"
_MATRIX = "{'conv_mode': 'matrix', 'optimize_bound_args': {'iteration': 3}}"


def draw_case(seed: int, methods: Collection[str] | None = None, allowed: Callable[[str], bool] | None = None) -> Case:
    """The case of a seed.

    Args:
        seed: Of every choice.
        methods: The only methods to call; default all.
        allowed: Which operations (by the name of their function) a network may have; default all.
    """
    rng = random.Random(seed)
    shape, batch = rng.choice(SHAPES), rng.choice([1, 2, 2, 2, 3, 4])
    x = _inputs(rng, (batch, *shape))
    network = draw_network(rng, shape, x, allowed)
    outputs = math.prod(network.shape_of(network.output))
    ball = _ball(rng, batch, unit="clamp" in x)
    case = Case(network, x, batch, rng.choice([batch] * 5 + [1, batch + 1]), ball)
    case = replace(case, dtype=rng.choice(["float64", "float64", "float32"]))
    case = replace(case, way=rng.choices(["module", "onnx", "register"], [0.75, 0.15, 0.1])[0])
    if rng.random() < 0.6:
        count, lead = rng.randint(1, 3), rng.choice([1, batch])
        kind = rng.choice(["1.0", "1.0", "'integer'"])
        case = replace(case, C=f"numbers(({lead}, {count}, {outputs}), {rng.randint(0, 9999)}, {kind})")
    if len(network.shape_of(network.output)) == 1 and outputs > 1:
        case = replace(case, labels=tuple(rng.randrange(outputs) for _ in range(batch)))
    case = replace(case, calls=tuple(_calls(rng, case, methods)))
    if any(call.method in ("alpha-CROWN", "forward-optimized") for call in case.calls):
        case = replace(case, options=_FEW_STEPS)
    if case.way == "module" and rng.random() < 0.1:
        case = replace(case, changed=True)
    return replace(case, options=_MATRIX) if rng.random() < 0.1 else case


def draw_network(rng: random.Random, shape: Shape, x: str, allowed: Callable[[str], bool] | None = None) -> Network:
    """A random network for inputs of that shape, finite at x."""
    names = [name for name in OPERATIONS if allowed is None or allowed(name)]
    chances = [OPERATIONS[name].weight for name in names]
    clean = execute(program(f"x = {x}"))["x"].double()
    growing = Growing(rng, shape, clean)
    wanted = rng.choice([1, 2, 3, 3, 4, 4, 5, 6, 8])
    for _ in range(40):
        if len(growing.lines) >= wanted:
            break
        grow(growing, rng.choices(names, chances)[0])
    if rng.random() < 0.5:
        for name in ("flat_head",) if allowed is None or allowed("linear") else ():
            grow(growing, name)
    return growing.network()


def _inputs(rng: random.Random, shape: Shape) -> str:
    drawn = f"numbers({shape}, {rng.randint(0, 9999)}"
    return rng.choice([f"{drawn}, 2.0)", f"{drawn}, 2.0)", f"{drawn}, 1.0).abs().clamp(max=1)", f"{drawn}, 'integer')",
                       f"{drawn}, 'zero')" if rng.random() < 0.2 else f"{drawn}, 1.0)"])  # fmt: skip


def _ball(rng: random.Random, batch: int, unit: bool) -> Ball:
    """A set; the range holds x, perhaps on its border."""
    norm = rng.choice([2.0, 2.0, 2.0, math.inf, math.inf, 1.0, 3.0, 1.5])
    radii = [0.0, 1e-6, 1e-3, 0.01, 0.1, 0.1, 0.3, 0.3, 0.5, 1.0, 1.0, 3.0, 10.0, 1e3]
    eps: float | tuple[float, ...] = rng.choice(radii)
    if rng.random() < 0.3:
        eps = tuple(rng.choice(radii) for _ in range(batch))
    if rng.random() < 0.08:
        return Ball(math.inf, None, rng.choice(["x - 0.2", "x", "x - x.abs()"]), rng.choice(["x + 0.3", "x + 1", "x"]))
    low = high = None
    if rng.random() < 0.4:
        low = rng.choice([None, "x - 0.1", "x", "float(x.min())", "float(x.min()) - 0.05", "x.amin(0, keepdim=True)",
                          "torch.full_like(x, -math.inf)", "x - (x > 0) * 0.2"])  # fmt: skip
        high = rng.choice([None, "x + 0.1", "x", "float(x.max())", "float(x.max()) + 0.05", "x.amax(0, keepdim=True)",
                           "torch.full_like(x, math.inf)", "x + (x > 0) * 0.2"])  # fmt: skip
        if unit and rng.random() < 0.6:
            low, high = "0.0", "1.0"
    if rng.random() < 0.06 and not isinstance(eps, tuple):
        low, high = rng.choice([(None, None), ("x - 0.1", "x + 0.2")])
        return Ball(norm, eps, low, high, engines=True)
    return Ball(norm, eps, low, high)


def _calls(rng: random.Random, case: Case, methods: Collection[str] | None) -> list[Call]:
    ours = list(OURS) if case.labels is not None else [name for name in OURS if name != "sparse-slope"]
    known = ours if case.way == "register" else [*ours, *ENGINES]
    known = [name for name in known if methods is None or name in methods]
    calls = []
    known = [name for name in known if "forward" not in name or rng.random() < 0.1]  # which are refused, in general
    for method in rng.sample(known, min(len(known), 10)):
        rows = case.C is not None and rng.random() < 0.6
        sides = rng.choice([(True, True)] * 4 + [(True, False), (False, True)])
        options: list[str] = ["labels=labels"] if method == "sparse-slope" else []
        if method in ("sparse-slope", "slope:random", "slope:0.3,0.7"):
            options.append(f"seed={rng.randint(0, 99)}")
        if method in ("sparse-slope", "slope:crown", "slope:random") and rng.random() < 0.4:
            options.append('intermediate="bcp"')
        if method == "sparse-slope" and rng.random() < 0.3:
            options.append("steps=3")
        if method == "bcp-alpha-crown":
            options.append("steps=4")
        if method in ("bcp", "bcp-crown") and rng.random() < 0.2:
            options.append("tighten=False")
        if method == "bcp" and rng.random() < 0.2:
            options += ['solver="iterative"', "max_steps=2"]
        if method in OURS and case.dtype == "float32" and rng.random() < 0.3:
            options.append("outward=True")
        fusible = case.labels is not None and (method == "sparse-slope" or method in ("slope:crown", "slope:cap"))
        if fusible and rng.random() < 0.2:
            options += ["loss_fusion=True", *(["labels=labels"] if method != "sparse-slope" else [])]
            rows, sides = False, (False, True)
        mode = rng.choice([""] * 8 + ["torch.no_grad()", "torch.inference_mode()"])
        calls.append(Call(method, tuple(options), rows, *sides, mode))
    return calls
