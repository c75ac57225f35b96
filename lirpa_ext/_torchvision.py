"""A torchvision that was built for another torch, made importable; onnx2torch and Lightning import it, and so do users.

The registry's torchvision beside a CPU build of torch fails with "operator torchvision::nms does not exist": its
compiled library cannot be loaded, and it then describes operators that nobody defined. Declaring them is all it
takes; what is compiled still fails when called, with torchvision's own message.

torch calls `install` when it is imported (an entry point of the group ``torch.backends``), so that the order of imports
does not matter; `import lirpa_ext` calls it for a torch that was told not to (TORCH_DEVICE_BACKEND_AUTOLOAD=0).
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

_declared: list[Any] = []  # a torch library lives as long as something holds it


class _Repairer(MetaPathFinder):
    """Declares the operators before a module of torchvision is imported for the first time; finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name.partition(".")[0] == "torchvision":
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            with contextlib.suppress(Exception):  # whatever is wrong with it, torchvision says so itself
                _declare()


def install() -> None:
    """Repair torchvision as soon as somebody imports it. This imports nothing."""
    if not any(isinstance(finder, _Repairer) for finder in sys.meta_path) and "torchvision.ops" not in sys.modules:
        sys.meta_path.insert(0, _Repairer())


def _declare() -> None:
    """Declare the operators that torchvision describes, if its compiled library is there and cannot be loaded."""
    if _declared:
        return
    import torch

    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "_meta_registrations.py").is_file() or not (folder / "_C.so").is_file():
        return
    with contextlib.suppress(OSError):
        torch.ops.load_library(str(folder / "_C.so"))  # which torchvision does as well
        return
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text())
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # declared by someone else
        for name in names:
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    _declared.append(library)
