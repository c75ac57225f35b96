"""Write docs/support.md from the rules and the engine's list: ``python docs/support_table.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from lirpa_ext.engine.positive_list import FAMILIES, engine_list
from lirpa_ext.rules import RULES, AffineRule, SetRule

PATH = Path(__file__).parent / "support.md"
TITLES = {"linear": "Linear maps", "elementwise": "Activations", "structure": "Shape, selection, sums"}
# Radius and box of the result, by class of the rule; a class that is not here shows its docstring.
SETS = {
    "Affine": ("‖W‖₂ ρ", "interval arithmetic, cut with Wz + b ± ‖Wᵢ‖₂ ρ"),
    "Elementwise": ("L ρ", "image of the box"),
    "MatMul": ("‖W‖₂ ρ", "interval arithmetic, cut with Wz ± ‖Wᵢ‖₂ ρ"),
    "Scaling": ("max |wᵢ| ρ", "interval arithmetic, cut with wz ± |wᵢ| ρ"),
    "Monotone": ("κ ρ", "image of the box"),
    "Reshape": ("ρ; of parts of a merged batch ρ each, √(ρ₁² + ρ₂² + ...) together", "the same"),
    "Cast": ("ρ", "the same"),
    "Sum": ("ρ₁ + ρ₂", "interval arithmetic"),
    "Negation": ("ρ", "ends swapped"),
    "Concat": ("√(ρ₁² + ρ₂² + ...)", "concatenated"),
}
HEADER = """\
# Supported nodes

Generated from `lirpa_ext.rules.RULES` and `lirpa_ext/engine/positive_list.json` by `python docs/support_table.py`; a
test keeps it up to date.

A node is what the engine (auto_LiRPA) makes of an operation of a traced model, named as in ONNX: a convolution is a
`BoundConv`, a residual connection a `BoundAdd`. `nn.Linear` and `nn.ReLU` are this package's `BoundBallBoxLinear` and
`BoundBallBoxRelu`. The set of its input is a ball of radius ρ around the clean value z, and a box. W is the matrix of
a linear map, Wᵢ its rows; L bounds the slope of an activation on the box; κ is 1, or for a max pool the root of the
number of windows that share an input, for an expansion that of the number of copies. *Rows* says whether the backward
methods (`bcp-crown`, `bcp-alpha-crown`) carry rows through the node exactly where it is affine. They relax a ReLU
over ball and box, any other node by a linear relaxation on the box, and end at the minimum over the node's own set
where it has none, of which `lirpa_ext.methods.BoundResult.ended_rows` tells.

A node without a rule, or whose rule declines, is bounded by the engine's interval arithmetic, and by the ball around
that box, if the engine's list below has it; `lirpa_ext.methods.BoundResult.fallbacks` names the nodes that took this
way, and so do the reports of `lirpa_ext.certify`. If the list does not have it, every method refuses it with an
`UnsupportedNodeError`.
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
    return "\n".join([*parts, ENGINE, *_engine_rows(), ""])


ENGINE = """\
## What the engine is trusted with

The engine's own bounds do not hold for everything that it accepts. This list has the nodes, by their configuration, on
which the contract suite (`python tests/engine/make_list.py`) attacked bounds of the engine and found every one to hold,
for l1, l2, l3 and l-infinity sets, with an eps for each sample, and cut to a range. A method of the engine runs on a
graph all of whose nodes are here for its family; else this package's own operators compute the method of that name
(IBP, CROWN-IBP, CROWN, alpha-CROWN), or it is refused (the forward methods). Another version of the engine has no list.

The families: *I*, interval arithmetic (IBP, and the boxes of CROWN-IBP); *B*, the backward pass (CROWN-IBP, CROWN,
alpha-CROWN); *F*, the forward pass; *R*, the linear relaxation of the node alone, which this package's backward methods
read. An operand is *p*, perturbed, or *c*, constant. The engine keeps coefficients of images as *patches*, or as a
*matrix*, which this package chooses where the list asks for it.
"""


def _engine_rows() -> list[str]:
    """Rows of the engine's list: node, configuration, and the letters of the families by version."""
    table = engine_list()
    versions = sorted(table)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for version in versions:
        for family in FAMILIES:
            for node, configurations in table[version].get(family, {}).items():
                for configuration in configurations:
                    letters = found.setdefault((node, configuration), dict.fromkeys(versions, ""))
                    letters[version] += family[0].upper()
    head = " | ".join(f"auto_LiRPA {version}" for version in versions)
    rows = [f"| node | configuration | {head} |", "|---|---|" + "---|" * len(versions)]
    for (node, configuration), letters in sorted(found.items()):
        rows.append(f"| `{node}` | {configuration} | {' | '.join(letters[version] for version in versions)} |")
    return rows


def _carries_rows(rule: SetRule) -> bool:
    return isinstance(rule, AffineRule) and getattr(rule, "back", True) is not None


def _first_paragraph(rule: SetRule) -> str:
    text = " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


if __name__ == "__main__":
    PATH.write_text(support_table(), encoding="utf-8")
