"""Write docs/support.md from the table of rules: ``python docs/support_table.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from lirpa_ext.rules import RULES, Rule

PATH = Path(__file__).parent / "support.md"
TITLES = {"linear": "Linear maps", "elementwise": "Activations", "structure": "Shape, selection, sums"}
# Radius and box of the result, by class of the rule; a class that is not here shows its docstring.
SETS = {
    "Affine": ("‖W‖₂ ρ", "interval arithmetic, cut with Wz + b ± ‖Wᵢ‖₂ ρ"),
    "Elementwise": ("L ρ", "image of the box"),
    "Monotone": ("κ ρ", "image of the box"),
    "Sum": ("ρ₁ + ρ₂", "interval arithmetic"),
    "Negation": ("ρ", "ends swapped"),
    "Concat": ("√(ρ₁² + ρ₂² + ...)", "concatenated"),
}
HEADER = """\
# Supported nodes

Generated from `lirpa_ext.rules.RULES` by `python docs/support_table.py`; a test keeps it up to date.

A node is what the engine (auto_LiRPA) makes of an operation of a traced model, named as in ONNX: a convolution is a
`BoundConv`, a residual connection a `BoundAdd`. `nn.Linear` and `nn.ReLU` are this package's `BoundBallBoxLinear` and
`BoundBallBoxRelu`. The set of its input is a ball of radius ρ around the clean value z, and a box. W is the matrix of
a linear map, Wᵢ its rows; L bounds the slope of an activation on the box; κ is 1, or for a max pool the root of the
number of windows that share an input, for an expansion that of the number of copies. *Rows* says whether the backward
methods (`bcp-crown`, `bcp-alpha-crown`) carry rows through the node exactly where it is affine. They relax a ReLU
over ball and box, any other node by the engine's linear relaxation, and end where it has none.

Whatever else the engine can bound by interval arithmetic is bounded by that, and by the ball around that box: sound,
and loose. So is a node whose rule declines, such as the product of two perturbed branches.
`lirpa_ext.BoundedModule.fallbacks` names the nodes that took this way in the last call, and so do the reports of
`lirpa_ext.certify`.
"""


def support_table() -> str:
    """The document."""
    families: dict[str, list[str]] = {}
    for node, rule in sorted(RULES.items()):
        if node.endswith("ByAdjoint"):  # stands in for the node of the same op, on auto_LiRPA 0.3 alone
            continue
        family = type(rule).__module__.rpartition(".")[2]
        radius, box = SETS.get(type(rule).__name__, (_first_paragraph(rule), ""))
        row = f"| `{node}` | {radius} | {box} | {'yes' if _carries_rows(rule) else ''} |"
        families.setdefault(family, []).append(row)
    parts = [HEADER]
    for family in sorted(families, key=lambda name: [*TITLES, name].index(name)):
        head = f"## {TITLES.get(family, family)}\n\n| node | radius | box | rows |\n|---|---|---|---|"
        parts.append("\n".join([head, *families[family], ""]))
    return "\n".join(parts)


def _carries_rows(rule: Rule) -> bool:
    return type(rule).adjoint is not Rule.adjoint and getattr(rule, "back", True) is not None


def _first_paragraph(rule: Rule) -> str:
    text = " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


if __name__ == "__main__":
    PATH.write_text(support_table(), encoding="utf-8")
