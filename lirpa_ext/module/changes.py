"""Changes of a model since its graph was traced, other than of the values of its weights and buffers.

A graph reads weights and buffers live. Everything else that the forward pass may depend on was fixed by the trace: the
modules and their classes, hooks, and attributes such as a stride or a slope. `Snapshot` records and compares these.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[str, str]  # path of the module, name of the attribute

# Attributes of every module without influence on its output in eval mode, or that are compared separately.
_SKIPPED = frozenset(
    {
        "training", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_pre_hooks",
        "_backward_hooks", "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    }
)  # fmt: skip
_PLAIN = frozenset({int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, bytes, complex})
_DEPTH = 3  # levels of nested objects in attributes whose contents are compared
_LENGTH = 64  # entries of a container beyond which its contents are not compared


class Snapshot:
    """Record of everything that the forward pass of a model may depend on besides weights, buffers and inputs.

    Args:
        model: The model.
        ignored: Attributes that the forward pass itself writes, such as a counter of calls. Default none.
    """

    def __init__(self, model: nn.Module, ignored: Collection[Key] = ()) -> None:
        self.ignored = frozenset(ignored)
        self._kept: list[Any] = []  # objects compared by their id, kept alive so that no other object gets the id
        self._found = self._look(model, self._kept)

    @classmethod
    def around(cls, model: nn.Module, run: Callable[[], object]) -> frozenset[Key]:
        """Attributes that the model writes while it runs.

        Args:
            model: The model.
            run: Runs the model.

        Returns:
            (path of the module, name of the attribute) for each.
        """
        before = cls(model)
        run()
        return frozenset(before._differing(cls(model)))

    def changes(self, model: nn.Module) -> str:
        """Text of how the model differs from the record, e.g. "'1' is Tanh, was ReLU"; "" if it does not."""
        now = Snapshot.__new__(Snapshot)
        now.ignored, now._kept = self.ignored, []
        now._found = self._look(model, now._kept)
        return "" if now._found == self._found else _describe(self, now, self._differing(now))

    def _differing(self, other: Snapshot) -> list[Key]:
        missing = object()
        keys = [*self._found, *(key for key in other._found if key not in self._found)]
        return [key for key in keys if self._found.get(key, missing) != other._found.get(key, missing)]

    def _look(self, model: nn.Module, kept: list[Any]) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        order: dict[int, int] = {}  # number of each weight in the order of the model, equal for tied weights
        seen: set[int] = set()
        stack = [("", model)]
        while stack:
            path, module = stack.pop()
            found[path, ""] = (type(module), type(module).forward, id(module) in seen)
            if id(module) in seen:
                continue
            seen.add(id(module))
            content = module.__dict__
            private = _is_lightning(module)
            for name, value in content.items():
                if name in _SKIPPED or (name.endswith("_hooks") and not value):
                    continue
                if private and name.startswith("_") and not name.endswith("_hooks"):
                    continue
                kind = type(value)
                found[path, name] = (value if value == value else "nan") if kind in _PLAIN else _key(value, kept, 0)
            for name, weight in (content.get("_parameters") or {}).items():
                if weight is None:
                    found[path, name] = None
                else:
                    found[path, name] = (weight.shape, weight.dtype, order.setdefault(id(weight), len(order)))
            for name, buffer in (content.get("_buffers") or {}).items():
                found[path, name] = None if buffer is None else (buffer.shape, buffer.dtype)
            for name, child in module._modules.items():
                if child is not None:
                    stack.append((f"{path}.{name}" if path else name, child))
        for key in self.ignored:
            found.pop(key, None)
        found["", "hooks of all modules"] = _key(_global_hooks(), kept, 0)
        return found


def _global_hooks() -> list[Any]:
    every = nn.modules.module
    return [every._global_forward_hooks, every._global_forward_pre_hooks]


def _is_lightning(module: nn.Module) -> bool:
    """Whether a module is Lightning's, whose private attributes are a trainer's state that no forward pass reads."""
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _key(value: Any, kept: list[Any], depth: int) -> Any:
    """A key to compare values by: the value itself if plain, the contents of a container, else the identity."""
    kind = type(value)
    if kind in _PLAIN:
        return value if value == value else "nan"
    kept.append(value)
    if isinstance(value, Tensor):  # not a buffer, so that the trace has it as a constant
        return id(value), None if value.is_inference() else value._version
    if depth == _DEPTH:
        return id(value)
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > _LENGTH:
        return id(value), len(value)
    if isinstance(value, list | tuple):
        return tuple([_key(part, kept, depth + 1) for part in value])
    if isinstance(value, set | frozenset):
        return frozenset([_key(part, kept, depth + 1) for part in value])
    if isinstance(value, dict):
        return tuple([(name, _key(part, kept, depth + 1)) for name, part in value.items()])
    if isinstance(value, nn.Module):  # not a registered submodule, so that the trace has its weights as constants
        parts = [*value.named_parameters(), *value.named_buffers()]
        return id(value), tuple([(name, _key(part, kept, depth + 1)) for name, part in parts])
    if kind.__module__.partition(".")[0] in ("torch", "builtins", "functools", "onnx", "onnxruntime", "numpy"):
        return id(value)
    content = getattr(value, "__dict__", None)
    if not isinstance(content, dict) or isinstance(value, type | types.ModuleType | types.FunctionType):
        return id(value)
    return id(value), _key(content, kept, depth + 1)


def _describe(before: Snapshot, after: Snapshot, keys: list[Key]) -> str:
    lines = []
    replaced = {path for path, name in keys if not name}
    keys = [(path, name) for path, name in keys if not name or path not in replaced]
    for path, name in keys[:3]:
        place = repr(path) if path else "the model"
        old, new = before._found.get((path, name)), after._found.get((path, name))
        if name == "":
            was, now = (value[0].__name__ if value else "not there" for value in (old, new))
            lines.append(f"{place} is {now}, was {was}")
        elif all(type(value) in (int, float, str, bool) for value in (old, new)):
            lines.append(f"{name} of {place} is {new!r}, was {old!r}")
        else:
            lines.append(f"{name.strip('_')} of {place} changed")
    return "; ".join(lines) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def modes(model: nn.Module) -> tuple[bool, ...]:
    """Train mode (True) or eval mode (False) of each module, in the order of ``model.modules()``."""
    return tuple([module.training for module in model.modules()])
