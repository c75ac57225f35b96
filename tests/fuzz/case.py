"""A case: a network, what is asked of it, and the text of the program that asks."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .program import Network, helpers

OURS = (
    "lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown", "sparse-slope", "slope:ibp", "slope:crown", "slope:cap",
    "slope:random", "slope:same", "slope:0.3,0.7", "cap",
)  # fmt: skip

_IMPORTS = {
    "contextlib.": "import contextlib",
    "io.": "import io",
    "math.": "import math",
    "sys.": "import sys",
    "auto_LiRPA.": "import auto_LiRPA",
    "lirpa_ext.": "import lirpa_ext",
    "torch.": "import torch",
    "F.": "import torch.nn.functional as F",
    "Bounded": "from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm",
    "nn.": "from torch import nn",
}
_EXPORT = """\
file = io.BytesIO()
torch.onnx.export(Net().eval(), (x[:1].float(),), file, dynamo=False, opset_version=17, input_names=["x"],
                  output_names=["y"], dynamic_axes={"x": {0: "b"}, "y": {0: "b"}})
model = lirpa_ext.load_onnx(file.getvalue())"""
_CHANGE = """\
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(-1.5)
"""


@dataclass(frozen=True)
class Ball:
    """The set of admissible inputs, as text.

    Attributes:
        norm: p.
        eps: One radius, one for each sample, or None for the box between `low` and `high`.
        low: Expression of the lower end of the range in x, or None.
        high: Of the upper end.
        engines: The engine's class in place of ours. For a finite p it ignores the range, for p = inf and a range eps.
    """

    norm: float = math.inf
    eps: float | tuple[float, ...] | None = 0.1
    low: str | None = None
    high: str | None = None
    engines: bool = False

    def source(self, sample: int | None, dtype: str) -> str:
        """Expression that makes it."""
        norm = "math.inf" if self.norm == math.inf else f"{self.norm}"
        parts = [f"norm={norm}", *([] if self.eps is None else [f"eps={self.radius(sample, dtype)}"])]
        parts += [f"x_L={self.low}"] if self.low is not None else []
        parts += [f"x_U={self.high}"] if self.high is not None else []
        kind = "auto_LiRPA.PerturbationLpNorm" if self.engines else "PerturbationLpNorm"
        return f"{kind}({', '.join(parts)})"

    def radius(self, sample: int | None, dtype: str) -> str:
        """Text of eps."""
        if not isinstance(self.eps, tuple):
            return str(self.eps)
        chosen = list(self.eps if sample is None else self.eps[sample : sample + 1])
        return f"torch.tensor({chosen}, dtype=torch.{dtype})"

    def region(self, x: Tensor, sample: int | None, dtype: str) -> Region:
        """The same set as float64 numbers."""
        scope = {"torch": torch, "x": x, "math": math}
        texts = (self.low, self.high, None if self.eps is None else self.radius(sample, dtype))
        low, high, eps = (
            None if text is None else torch.as_tensor(eval(text, dict(scope)), dtype=torch.float64) for text in texts
        )
        if self.engines:
            low, high = (low, high) if self.norm == math.inf else (None, None)
            eps = None if low is not None and high is not None else eps
        return Region(self.norm, eps, low, high)


@dataclass(frozen=True)
class Region:
    """A perturbation set in float64, with the attributes that `soundness` reads."""

    norm: float
    radius: Tensor | None
    range_lower: Tensor | None
    range_upper: Tensor | None


@dataclass(frozen=True)
class Call:
    """One call of `compute_bounds`.

    Attributes:
        method: Its name.
        options: Further arguments, as text.
        rows: Whether C is given.
        lower: Whether the lower side is asked.
        upper: Whether the upper side is asked.
        mode: Context that the call runs in, ``torch.no_grad()`` or another, or "".
    """

    method: str
    options: tuple[str, ...] = ()
    rows: bool = False
    lower: bool = True
    upper: bool = True
    mode: str = ""

    @property
    def fused(self) -> bool:
        """Whether the cross entropy of the labels is bounded, not the outputs."""
        return "loss_fusion=True" in self.options

    def source(self) -> str:
        """Statements that set `lower` and `upper`."""
        arguments = ["x=(BoundedTensor(x, perturbation),)", *(["C=C"] if self.rows else []), f'method="{self.method}"']
        arguments += [f"bound_{side}=False" for side in ("lower", "upper") if not getattr(self, side)]
        call = f"lower, upper = bounded.compute_bounds({', '.join([*arguments, *self.options])})"
        if self.method == "slope:same":
            drawn = call.replace('"slope:same"', '"slope:random", seed=3')
            call = f"{drawn}\n{call[:-1]}, slopes=bounded.last_result.relaxation.slopes)"
        return f"with {self.mode}:\n{textwrap.indent(call, '    ')}" if self.mode else call


@dataclass(frozen=True)
class Case:
    """What is checked at once.

    Attributes:
        network: The network.
        x: Expression of the clean inputs, (B, ...), float32 numbers.
        batch: B.
        built: Samples that the graph is built with.
        ball: The set.
        dtype: "float64" or "float32".
        way: "module", "onnx" (exported and imported), or "register" (on the engine's own class).
        C: Expression of the specification rows, or None.
        labels: Classes, one for each sample, or None.
        options: Expression of `bound_opts`, or None.
        sample: The only sample that is kept, or None for all.
        changed: Whether the weights change after the graph was built and used.
        calls: What is asked.
    """

    network: Network
    x: str
    batch: int
    built: int = 1
    ball: Ball = field(default_factory=Ball)
    dtype: str = "float64"
    way: str = "module"
    C: str | None = None
    labels: tuple[int, ...] | None = None
    options: str | None = None
    sample: int | None = None
    changed: bool = False
    calls: tuple[Call, ...] = ()

    @property
    def _cut(self) -> str:
        return "" if self.sample is None else f"[{self.sample} : {self.sample + 1}]"

    def setup(self, call: Call | None = None) -> str:
        """Statements up to `bounded`, without the imports; those that the call needs, or all."""
        double = ".double()" if self.dtype == "float64" else ""
        text = f"torch.manual_seed(0)\nx = {self.x}{self._cut}{double}\n"
        if self.way == "onnx":
            text += f"{_EXPORT}{double}\n"
        else:
            text += f"model = Net().eval(){double}\n"
        text += f"perturbation = {self.ball.source(self.sample, self.dtype)}\n"
        if self.C is not None and (call is None or call.rows):
            one = "" if self.C.startswith("numbers((1,") else self._cut
            text += f"C = {self.C}{one}{double}\n"
        if self.labels is not None and (call is None or "labels=labels" in call.options):
            chosen = list(self.labels if self.sample is None else self.labels[self.sample : self.sample + 1])
            text += f"labels = torch.tensor({chosen})\n"
        options = "" if self.options is None else f", bound_opts={self.options}"
        if self.way == "register":
            text += f"lirpa_ext.register()\nbounded = auto_LiRPA.BoundedModule(model, x{options})\n"
        else:
            shown = "x" if self.built == self.size else f"x.repeat(2, *[1] * (x.dim() - 1))[:{self.built}]"
            shown = f"x[:{self.built}]" if self.built < self.size else shown
            text += f"bounded = BoundedModule(model, {shown}{options})\n"
        if self.changed:
            text += f"with contextlib.suppress(lirpa_ext.errors.LirpaExtError):\n    {Call('bcp').source()}\n{_CHANGE}"
        return text

    @property
    def size(self) -> int:
        """Samples that are bounded."""
        return self.batch if self.sample is None else 1

    def source(self, call: Call | None = None, tail: str = "") -> str:
        """The program up to `bounded`, and what follows."""
        return program(f"{self.network.source()}\n\n{self.setup(call)}{tail}")

    def run(self) -> dict[str, Any]:
        """Run the program up to `bounded`; the names that it sets."""
        return execute(self.source(tail="BoundedTensor"))

    def inputs(self) -> Tensor:
        """The clean inputs, in the case's dtype."""
        return execute(program(f"x = {self.x}{self._cut}"))["x"].to(getattr(torch, self.dtype))

    def model(self) -> nn.Module:
        """The network in float64."""
        text = f"{self.network.source()}\n\ntorch.manual_seed(0)\nmodel = Net().eval().double()\n"
        return execute(program(text + _CHANGE if self.changed else text))["model"]


def program(body: str) -> str:
    """Statements with the imports and functions that they need before them."""
    text = helpers(body) + body
    # the engine only after this package, which makes it importable
    used = [line for name, line in _IMPORTS.items() if re.search(rf"\b{re.escape(name)}", text)]
    used.sort(key=lambda line: (line.startswith("import auto_LiRPA"), "lirpa_ext" in line or "torch" in line, line))
    return "\n".join(used) + "\n\n\n" + text


def execute(text: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run statements with those names; the names after it."""
    names = {} if names is None else names
    exec(compile(text, "<fuzz>", "exec"), names)
    return names
