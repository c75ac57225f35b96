"""A placeholder for torchvision while onnx2torch is imported, if torchvision cannot be imported."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def torchvision_or_placeholder() -> Iterator[None]:
    """Context in which onnx2torch can be imported without torchvision, or with one that cannot be repaired.

    onnx2torch uses torchvision only for operations of object detectors. A placeholder takes its place during the
    ``with``; a network with one of these operations raises ImportError with the cause.
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
