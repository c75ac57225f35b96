"""Recording what a model does while it runs: its calls of torch functions, and where Python reads values of tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import engine

# Functions through which Python reads the values of a tensor, on which the model's control flow may then depend.
_READERS = frozenset(
    {
        "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "item", "tolist", "numpy", "equal",
        "allclose", "is_nonzero",
    }
)  # fmt: skip
# Folders whose frames are not the model's own code.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Call:
    """A call of a torch function by a model.

    Attributes:
        name: Name of the function.
        place: Innermost module around the call, e.g. "'3' (AvgPool2d)".
        output: Output of the function, the first one if there are several.
    """

    name: str
    place: str
    output: Tensor

    def __str__(self) -> str:
        return f"{self.name} in {self.place}"


class Calls(TorchFunctionMode):
    """Context that records the calls of torch functions that return a floating-point tensor.

    Args:
        model: The model that will run.

    Attributes:
        calls: The calls, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, list[Call]()
        self._places = [type(model).__name__]

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Call]:
        """The calls of one run of a model; those before the failure if the model fails.

        Args:
            model: The model.
            inputs: Inputs, (B, ...) each.
        """
        watch = cls(model)
        with watch._in_modules(), contextlib.suppress(Exception), watch:
            model(*inputs)
        return watch.calls

    @contextlib.contextmanager
    def _in_modules(self) -> Iterator[None]:
        """Keep the stack of modules in `_places` up to date while submodules are entered and left."""

        def enter(place: str) -> Callable[..., None]:
            return lambda *_: self._places.append(place)

        def leave(*_: Any) -> None:
            self._places.pop()

        hooks = []
        for path, module in self.model.named_modules():
            if path:
                hooks.append(module.register_forward_pre_hook(enter(f"{path!r} ({type(module).__name__})")))
                hooks.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple) and output else output
        name = getattr(func, "__name__", "")
        if (
            isinstance(first, Tensor)
            and first.is_floating_point()
            and first.dim()
            and name not in ("__get__", "detach")
        ):
            self.calls.append(Call(name.strip("_"), self._places[-1], first.detach().clone()))
        return output


class Reads(TorchFunctionMode):
    """Context that records where Python reads values that depend on the data: a branch, ``.item()``, ``.tolist()``.

    A trace keeps the values of its example, so that the graph may be another function for other inputs. Values that
    depend on sizes or frozen constants alone, such as the shapes in an imported network, are not recorded.

    Args:
        model: The model that will run.

    Attributes:
        places: Places of the reads, each once, e.g. "net.py:12".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: list[str] = []
        weights = (parameter for parameter in engine.parameters(model) if not parameter.requires_grad)
        self._constants = {id(tensor) for tensor in (*weights, *engine.buffers(model))}
        self._derived: dict[int, Tensor] = {}  # whole numbers and truth values from data, kept alive for their ids

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = any(self._is_data(value) for value in _flat((*args, *kwargs.values())))
        if given and getattr(func, "__name__", "") in _READERS and (place := _place()) not in self.places:
            self.places.append(place)
        output = func(*args, **kwargs)
        if given:
            whole = [value for value in _flat((output,)) if isinstance(value, Tensor) and not value.is_floating_point()]
            self._derived |= {id(value): value for value in whole}
        return output

    def _is_data(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return id(value) in self._derived or (value.is_floating_point() and id(value) not in self._constants)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


class NoDropout(TorchFunctionMode):
    """Context in which dropout is the identity."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _place() -> str:
    """File and line of the innermost frame outside of torch and this package."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
