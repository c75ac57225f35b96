"""Exceptions of the package; their messages name the cause and the next step."""

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
    """The engine (auto_LiRPA) is missing, or its version is not supported."""


class InvalidInputError(LirpaExtError, ValueError):
    """An argument has a wrong shape, range or value (negative eps, image with NaN, label out of range)."""


class OptionError(LirpaExtError, TypeError):
    """A method, attack or command was given an option that it does not have, or one of a wrong type."""


class UnknownMethodError(LirpaExtError, ValueError):
    """No bound method of that name is registered."""


class RegistrationError(LirpaExtError, ValueError):
    """An entry of that name (a method, rule, loss, attack, ...) exists already."""


class TraceError(LirpaExtError, RuntimeError):
    """The engine cannot turn the model into a graph."""


class TrainModeError(LirpaExtError, RuntimeError):
    """The model is in a mode in which its output for a sample depends on the batch (batch norm in train mode)."""


class UnsupportedNodeError(LirpaExtError, NotImplementedError):
    """Neither a rule of the package nor the engine can bound a node of the graph."""


class EstimateError(LirpaExtError, TypeError):
    """An estimate (by power iteration) was requested where only a bound is sound."""


class ConfigError(LirpaExtError, ValueError):
    """A training configuration cannot be run: unknown key, impossible schedule, missing package."""


class DataError(LirpaExtError, ValueError):
    """A data set, checkpoint or ONNX file cannot be read, is empty or does not fit the model."""


class OnnxError(DataError):
    """An ONNX network cannot be imported, though its file is readable.

    Attributes:
        op: Type of the operation that prevents the import, or "".
        node: Name of its node, or "".
        opset: Version of ONNX's standard operations in the file, or 0.
    """

    def __init__(self, message: str, op: str = "", node: str = "", opset: int = 0) -> None:
        super().__init__(message)
        self.op, self.node, self.opset = op, node, opset


class ResultsError(LirpaExtError, ValueError):
    """A file of results is corrupt, in use, cannot be written, or is of another model, data set or configuration."""


class OutOfMemoryError(LirpaExtError, MemoryError):
    """A single sample does not fit into memory with that method."""


class SoundnessError(LirpaExtError, RuntimeError):
    """A bound does not hold at a point of the set, which is a defect of the method."""
