"""Repair of a torchvision that was built for another torch, so that it can be imported (by onnx2torch and Lightning).

The torchvision of PyPI next to a CPU build of torch fails with "operator torchvision::nms does not exist": its compiled
library cannot be loaded, and its Python code then refers to operators that do not exist. Declaring these operators
makes the import work; compiled operators still fail when they are called, with torchvision's own message.

torch calls `install` when it is imported (an entry point of the group ``torch.backends``), so that the order of imports
does not matter. ``import lirpa_ext`` calls it too, in case that torch does not load entry points
(TORCH_DEVICE_BACKEND_AUTOLOAD=0).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_declared: list[Any] = []  # keeps the torch library alive


class _Repairer(MetaPathFinder):
    """Import hook that declares the operators before the first import of torchvision; it finds no module itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name.partition(".")[0] == "torchvision":
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            with contextlib.suppress(Exception):  # the import of torchvision reports what is wrong
                _declare()


def install() -> None:
    """Install the import hook that repairs torchvision on its first import; nothing is imported now."""
    if not any(isinstance(finder, _Repairer) for finder in sys.meta_path) and "torchvision.ops" not in sys.modules:
        sys.meta_path.insert(0, _Repairer())


def _declare() -> None:
    """Declare the operators of torchvision, if its compiled library exists and cannot be loaded."""
    if _declared:
        return
    import torch

    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "_meta_registrations.py").is_file() or not (folder / "_C.so").is_file():
        return
    with contextlib.suppress(OSError):
        torch.ops.load_library(str(folder / "_C.so"))  # torchvision does the same
        return
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text())
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # the operators are declared already
        for name in names:
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    _declared.append(library)
