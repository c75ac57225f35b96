"""Exceptions of the package: each names the cause and the next step."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "EstimateError",
    "InvalidInputError",
    "LirpaExtError",
    "OnnxError",
    "OptionError",
    "OutOfMemoryError",
    "RegistrationError",
    "ResultsError",
    "SoundnessError",
    "TraceError",
    "TrainModeError",
    "UnknownMethodError",
    "UnsupportedNodeError",
]


class LirpaExtError(Exception):
    """Base class of every exception raised on purpose by this package."""


class EngineError(LirpaExtError, ImportError):
    """The engine (auto_LiRPA) is missing or of a version that the package does not know."""


class InvalidInputError(LirpaExtError, ValueError):
    """An argument has a wrong shape, range or value (negative eps, NaN image, label out of range)."""


class OptionError(LirpaExtError, TypeError):
    """A method was given an option that it does not have, or of the wrong type."""


class UnknownMethodError(LirpaExtError, ValueError):
    """No bound method of that name is registered."""


class RegistrationError(LirpaExtError, ValueError):
    """A method or rule of that name exists already."""


class TraceError(LirpaExtError, RuntimeError):
    """The engine cannot turn the model into a graph."""


class TrainModeError(LirpaExtError, RuntimeError):
    """The model is in a mode in which its function is not fixed (train-mode batch norm)."""


class UnsupportedNodeError(LirpaExtError, NotImplementedError):
    """Neither a rule of the package nor the engine can bound a node."""


class EstimateError(LirpaExtError, TypeError):
    """An estimate (power iteration) was given where only a bound is sound."""


class ConfigError(LirpaExtError, ValueError):
    """A training configuration that cannot be run: unknown key, impossible schedule, missing package."""


class DataError(LirpaExtError, ValueError):
    """A data set, checkpoint or ONNX file cannot be read, is empty or does not fit the model."""


class OnnxError(DataError):
    """A network that is well formed, but cannot be imported.

    Attributes:
        op: Type of the operation that stands in the way, or "".
        node: Its name, or "".
        opset: Version of the standard operations that the file uses, or 0.
    """

    def __init__(self, message: str, op: str = "", node: str = "", opset: int = 0) -> None:
        super().__init__(message)
        self.op, self.node, self.opset = op, node, opset


class ResultsError(LirpaExtError, ValueError):
    """A results file is corrupt, in use, cannot be written, or is of another model, data set or configuration."""


class OutOfMemoryError(LirpaExtError, MemoryError):
    """A single sample does not fit into memory with that method."""


class SoundnessError(LirpaExtError, RuntimeError):
    """A bound does not hold at a point of the set: a defect of the method, never a result."""
