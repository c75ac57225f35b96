"""The outer-bound picture (Fig. 3.2): regions that contain two logits of one sample, and logits that attacks reach.

For a direction d in the plane (zeta_y, zeta_m), a method's lower bound h(d) on d . zeta means that the logits of the
whole set lie in the half-plane d . zeta >= h(d). The region of a method is the intersection over many directions. It is
an outer bound for every method; if the method's own outer bound is a ball, a box, or ball INTERSECT box, the region
touches the exact projection of that bound in every direction. S. Lee's dissertation (2021), 3.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import PGD
from ..errors import InvalidInputError
from ..reporting.plots import style
from ..reporting.results import Result, Row
from .subject import Subject, options_by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OuterBound", "outer_bound", "plot_outer_bound", "zonotope"]

DEFAULT_METHODS = ("lipschitz", "bcp")
BOX = "box"
ATTACKS = ("margin", "cross-entropy")  # losses of PGD in Fig. 3.2


@dataclass(frozen=True)
class OuterBound(Result):
    """Result of `outer_bound`: regions in the plane of two logits (zeta_y, zeta_m) of one sample.

    Attributes:
        index: Number of the sample.
        label: y, the class of the sample.
        other: m, the other class.
        eps: Radius of the ball.
        norm: p of the ball.
        logits: Clean logits (z_y, z_m), (2,).
        regions: Method -> vertices of its region, (V, 2), counterclockwise. "box" is the region of the box of "bcp"
            alone, a zonotope; it exists if the network ends in a dense layer.
        margins: Method -> lower bound of zeta_y - zeta_m over its region; above 0, the pair is verified.
        points: Loss of the attack -> logits that it reached, (N, 2).
    """

    index: int
    label: int
    other: int
    eps: float
    norm: float
    logits: np.ndarray
    regions: dict[str, np.ndarray]
    margins: dict[str, float]
    points: dict[str, np.ndarray]

    def rows(self) -> list[Row]:
        """One row for each region (area, also in percent of the first region's, and margin) and for each attack."""
        first = area(next(iter(self.regions.values())))
        rows: list[Row] = [
            {"region": name, "area": area(v), "area %": 100 * area(v) / first if first else None}
            | {"min margin": self.margins[name], "verified": self.margins[name] > 0}
            for name, v in self.regions.items()
        ]
        return rows + [
            {"region": f"PGD, {name}", "area": None, "area %": None, "min margin": margin, "verified": None}
            for name, margin in self.reached.items()
        ]

    @property
    def reached(self) -> dict[str, float]:
        """Loss of the attack -> smallest zeta_y - zeta_m of its points."""
        return {name: float((points[:, 0] - points[:, 1]).min()) for name, points in self.points.items()}

    def summary(self) -> str:
        """Margin of each region, and the smallest margin that an attack reached, in words."""
        told = "; ".join(f"{name} {margin:.3g}" for name, margin in self.margins.items())
        near = f", PGD reaches {min(self.reached.values()):.3g}" if self.points else ""
        return (
            f"Logits of class {self.label} (the label) and {self.other} of sample {self.index} in the l{self.norm:g} "
            f"ball of eps {self.eps:g}: least margin by region: {told}{near}."
        )

    def details(self) -> list[Row]:
        """Vertices of the regions, and the logits that attacks reached."""
        sets = {"clean": self.logits[None]} | self.regions | {f"PGD, {name}": p for name, p in self.points.items()}
        return [{"set": name, "label": p[0], "other": p[1]} for name, points in sets.items() for p in points.tolist()]


def outer_bound(
    model: nn.Module,
    x: Tensor,
    y: int,
    eps: float,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    norm: float = 2,
    x_L: float | Tensor | None = None,
    x_U: float | Tensor | None = None,
    other: int | None = None,
    index: int = 0,
    directions: int = 256,
    attack_steps: int = 40,
    attack_starts: int = 32,
    seed: int = 0,
) -> OuterBound:
    """Regions of two logits of one sample by several methods, and the logits that PGD reaches.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        x: The sample, without a batch axis, (...).
        y: Class of the sample.
        eps: Radius in units of the input.
        methods: Bound methods, default "lipschitz" (an ellipse for the ball alone) and "bcp" (ball INTERSECT box).
        options: Method -> its options.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end of the data range, default none.
        other: The other class m, default the most probable class besides `y`.
        index: Number of the sample, kept in the result; default 0.
        directions: Number of directions, at least 8, default 256. A polygon around a disc then exceeds it by at most
            the factor 1 / cos(pi / directions).
        attack_steps: Steps of PGD, default 40; 0 for no attack.
        attack_starts: Random starts of PGD for each loss, default 32.
        seed: Seed of the starts, default 0.

    Returns:
        The regions, in float64.

    Raises:
        InvalidInputError: There are too few directions, `y` or `other` is no class, both are the same, a bound is not
            finite, or as `Subject`.
        OptionError: There are options of a method that is not used.
    """
    if directions < 8:
        raise InvalidInputError(f"a region needs at least 8 directions, got {directions}")
    subject = Subject(model, (x.unsqueeze(0), torch.tensor([y])), norm, x_L, x_U)
    x, label = subject.x, subject.y
    with torch.no_grad():
        logits = subject.model(x)[0]
    if other is None:
        other = int(logits.scatter(0, label, -torch.inf).argmax())
    if other == y or not 0 <= other < subject.classes:
        raise InvalidInputError(f"other must be a class besides {y} from 0 to {subject.classes - 1}, got {other}")
    pair = [y, other]
    angles = torch.arange(directions, dtype=x.dtype) * (2 * math.pi / directions)
    plane = torch.cat([torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([[1.0, -1.0]], dtype=x.dtype)])
    rows = x.new_zeros(1, len(plane), subject.classes)
    rows[0, :, pair] = plane.to(x)
    regions, margins = {}, {}
    for method, chosen in options_by_method(methods, options).items():
        bound = subject.lower(x, label, eps, rows, method, chosen)[0].cpu()
        regions[method] = half_planes(plane[:-1].numpy(), bound[:-1].numpy())
        margins[method] = float(bound[-1])
    with torch.no_grad():
        last = subject.graph(x).last_layer(subject.perturbed(x, eps))
    if last is not None:
        lower, upper = (end[0] for end in last.set.box())
        weight = last.weight[pair]
        middle = weight @ (lower + upper) / 2 + (0 if last.bias is None else last.bias[pair])
        regions[BOX] = zonotope(middle.cpu().numpy(), (weight * (upper - lower) / 2).cpu().numpy())
        margins[BOX] = float((regions[BOX] @ [1.0, -1.0]).min())
    points = {}
    if attack_steps:
        starts = x.expand(attack_starts, *x.shape[1:])
        for loss in ATTACKS:
            found = PGD(attack_steps, loss=loss)(
                subject.model, starts, label.expand(attack_starts), subject.perturbed(x, eps).ptb,
                torch.Generator().manual_seed(seed),
            )  # fmt: skip
            with torch.no_grad():
                points[loss] = subject.model(found.inputs)[:, pair].cpu().numpy()
    return OuterBound(index, y, other, float(eps), float(norm), logits[pair].cpu().numpy(), regions, margins, points)


def half_planes(directions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Vertices of the intersection of half-planes {p : directions p >= offsets}, which must be bounded.

    Args:
        directions: Normal vectors, (K, 2), of length 1.
        offsets: Offsets, (K,).

    Returns:
        Vertices, (V, 2), counterclockwise; (0, 2) if the intersection is empty.

    Raises:
        InvalidInputError: An offset is not finite.
    """
    if not np.isfinite(offsets).all():
        raise InvalidInputError("a bound is NaN or infinite: there is no region to draw; take a smaller eps")
    reach = 4 * (np.abs(offsets).max() + 1)
    polygon = reach * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for direction, offset in zip(directions, offsets, strict=True):
        height = polygon @ direction - offset
        kept: list[np.ndarray] = []
        for (a, height_a), (b, height_b) in zip(
            zip(polygon, height, strict=True),
            zip(np.roll(polygon, -1, 0), np.roll(height, -1), strict=True),
            strict=True,
        ):
            if height_a >= 0:
                kept.append(a)
            if (height_a < 0) != (height_b < 0):
                kept.append(a + (b - a) * (height_a / (height_a - height_b)))
        if not kept:
            return np.empty((0, 2))
        polygon = np.array(kept)
    return polygon


def zonotope(center: np.ndarray, generators: np.ndarray) -> np.ndarray:
    """Vertices of the zonotope {center + generators t : -1 <= t <= 1} in the plane.

    Args:
        center: Center, (2,).
        generators: Generators, (2, n).

    Returns:
        Vertices, (2 k, 2), counterclockwise, with k the number of generators other than 0; (1, 2) if there are none.
    """
    sides = generators.T[np.abs(generators).sum(0) > 0]
    sides = np.where(
        (sides[:, 1:] < 0) | ((sides[:, 1:] == 0) & (sides[:, :1] < 0)), -sides, sides
    )  # to the upper half
    sides = sides[np.argsort(np.arctan2(sides[:, 1], sides[:, 0]))]
    walk = np.concatenate([np.zeros((1, 2)), 2 * sides, -2 * sides])[:-1] if len(sides) else np.zeros((1, 2))
    return center - sides.sum(0) + walk.cumsum(0)


def area(vertices: np.ndarray) -> float:
    """Area of a polygon with vertices (V, 2), counterclockwise, by the shoelace formula."""
    if len(vertices) < 3:
        return 0.0
    x, y = (vertices - vertices[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def plot_outer_bound(result: OuterBound, axes: Axes) -> None:
    """Plot the regions, the line zeta_y - zeta_m = margin of each method, the decision line, and the points.

    Args:
        result: Result of `outer_bound`.
        axes: Axes to draw on.
    """
    from matplotlib.patches import Polygon

    for number, (name, vertices) in enumerate(result.regions.items()):
        shown = style(number)["color"]
        filled = name == BOX
        axes.add_patch(Polygon(vertices, closed=True, facecolor=shown if filled else "none", alpha=0.2 if filled else 1,
                               edgecolor="none" if filled else shown, linewidth=1.5, label=name))  # fmt: skip
        if not filled:
            # zeta_y is on the horizontal axis, so the line zeta_m = zeta_y - margin is above the whole region.
            axes.axline((result.margins[name], 0.0), slope=1, color=shown, linestyle="--", linewidth=1)
    axes.axline((0.0, 0.0), slope=1, color="black", linewidth=1, label="decision line")
    for marker, (loss, points) in zip("x+", result.points.items(), strict=False):
        axes.plot(points[:, 0], points[:, 1], marker, color="black", markersize=5, label=f"PGD, {loss}")
    axes.plot(*result.logits, "o", color="black", markersize=5, label="clean")
    corners = np.concatenate([v for name, v in result.regions.items() if name != BOX] or list(result.regions.values()))
    low, high = corners.min(0), corners.max(0)
    pad = 0.08 * (high - low + 1e-9)
    axes.set(
        xlabel=f"logit of the label, {result.label}", ylabel=f"logit of class {result.other}",
        xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]),
        title=f"sample {result.index}, l{result.norm:g} eps {result.eps:g}",
    )  # fmt: skip
    axes.legend(fontsize="small")
