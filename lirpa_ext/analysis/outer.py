"""The outer-bound picture (Fig. 3.2): what a method knows of two logits of one sample, beside what attacks reach.

For a direction d of the plane (zeta_y, zeta_m), a method's lower bound h(d) on d . zeta says that all logits of the set
lie in the half-plane d . zeta >= h(d). The region of a method is the intersection over many directions: an outer bound
for whatever method, which for ball, box and ball INTERSECT box touches the exact projection in every direction.
S. Lee's dissertation (2021), 3.2.2.
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
ATTACKS = ("margin", "cross-entropy")  # losses of PGD, those of Fig. 3.2


@dataclass(frozen=True)
class OuterBound(Result):
    """Regions of the plane of two logits, (zeta_y, zeta_m), of one sample.

    Attributes:
        index: The sample's.
        label: y, its class.
        other: m, the most probable class besides.
        eps: Radius of the set.
        norm: p of the ball.
        logits: Clean (z_y, z_m).
        regions: Vertices (V, 2) of each method's region, counterclockwise; "box" is that of the box of "bcp" alone, a
            parallelogram or, for more than two neurons, a zonotope. It needs a network that ends in a dense layer.
        margins: Each region's min (zeta_y - zeta_m), as the method bounds it; the pair is verified where it is above 0.
        points: Logits (N, 2) that attacks reached, by their loss.
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
        """One row for each region: area, its share of the first one's, worst margin; and the attacks' margins."""
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
        """Smallest zeta_y - zeta_m of each attack's points."""
        return {name: float((points[:, 0] - points[:, 1]).min()) for name, points in self.points.items()}

    def summary(self) -> str:
        """Which region verifies the pair, and how near the attacks came."""
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
    """Regions of two logits of one sample, by several methods, and the logits that PGD reaches.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        x: The sample, without a batch dimension.
        y: Its class.
        eps: Radius in units of the input.
        methods: Default "lipschitz" (the ball's ellipse) and "bcp" (ball INTERSECT box).
        options: Options by method.
        norm: p of the lp ball, default 2.
        x_L: Lower end of the data range, default none.
        x_U: Upper end, default none.
        other: m, default the most probable class besides `y`.
        index: The sample's number, kept in the result.
        directions: Directions of a region, at least 8; a smooth region's polygon then reaches beyond it by at most
            the factor 1 / cos(pi / directions).
        attack_steps: Steps of PGD, default 40; 0 for no attack.
        attack_starts: Random starts of each of its losses.
        seed: Of the starts.

    Returns:
        The regions, in float64.

    Raises:
        InvalidInputError: Too few directions, classes that are none or the same, a bound that is not finite, or as
            `Subject` says.
        OptionError: Options of a method that is not compared.
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
    """Vertices (V, 2), counterclockwise, of {p : directions p >= offsets}; (0, 2) where it is empty.

    Args:
        directions: (K, 2); the region must be bounded.
        offsets: (K,).
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
    """Vertices (2n, 2), counterclockwise, of {center + generators t : -1 <= t <= 1}.

    Args:
        center: (2,).
        generators: (2, n); those of length 0 drop out.
    """
    sides = generators.T[np.abs(generators).sum(0) > 0]
    sides = np.where(
        (sides[:, 1:] < 0) | ((sides[:, 1:] == 0) & (sides[:, :1] < 0)), -sides, sides
    )  # to the upper half
    sides = sides[np.argsort(np.arctan2(sides[:, 1], sides[:, 0]))]
    walk = np.concatenate([np.zeros((1, 2)), 2 * sides, -2 * sides])[:-1] if len(sides) else np.zeros((1, 2))
    return center - sides.sum(0) + walk.cumsum(0)


def area(vertices: np.ndarray) -> float:
    """Area of a polygon, by the shoelace formula."""
    if len(vertices) < 3:
        return 0.0
    x, y = (vertices - vertices[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def plot_outer_bound(result: OuterBound, axes: Axes) -> None:
    """Draw the regions, each method's verification line zeta_y - zeta_m = min, the decision line, and the points."""
    from matplotlib.patches import Polygon

    for number, (name, vertices) in enumerate(result.regions.items()):
        shown = style(number)["color"]
        filled = name == BOX
        axes.add_patch(Polygon(vertices, closed=True, facecolor=shown if filled else "none", alpha=0.2 if filled else 1,
                               edgecolor="none" if filled else shown, linewidth=1.5, label=name))  # fmt: skip
        if not filled:
            # zeta_y on the horizontal axis: zeta_m = zeta_y - min lies above every point of the region
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
