"""A torchvision that was built for another torch, made importable; onnx2torch imports it, and so do users.

The registry's torchvision beside a CPU build of torch fails with "operator torchvision::nms does not exist": its
compiled library cannot be loaded, and it then describes operators that nobody defined. Declaring them is all it
takes; what is compiled still fails when called, with torchvision's own message.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_declared: list[Any] = []  # a torch library lives as long as something holds it


def repair_torchvision() -> None:
    """Declare the operators that torchvision describes, if its compiled library is there and cannot be loaded."""
    if _declared or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "_meta_registrations.py").is_file() or not (folder / "_C.so").is_file():
        return
    with contextlib.suppress(OSError):
        torch.ops.load_library(str(folder / "_C.so"))  # which torchvision does as well, once it is imported
        return
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text())
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # declared by someone else
        for name in names:
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    _declared.append(library)


@contextlib.contextmanager
def torchvision_or_placeholder() -> Iterator[None]:
    """Let onnx2torch be imported where there is no torchvision, or one that cannot be repaired.

    onnx2torch needs it for two operators of object detectors alone. A placeholder stands in during that import
    and is gone after it; a network that has one of those operators gets the cause as its error.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        cause = f"torchvision cannot be imported ({error}); install the build that goes with your torch"
    else:
        yield
        return

    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError(cause)

    package, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    package.ops = ops  # type: ignore[attr-defined]
    for name in ("box_convert", "nms", "roi_align"):
        setattr(ops, name, missing)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    sys.modules |= {"torchvision": package, "torchvision.ops": ops}
    try:
        yield
    finally:
        for name in ("torchvision", "torchvision.ops"):
            del sys.modules[name]
        sys.modules |= before
