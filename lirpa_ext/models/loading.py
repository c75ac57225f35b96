"""Models from files: ONNX, checkpoints of this package, state dicts. Pickled objects are loaded only if trusted."""

from __future__ import annotations

import importlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..reporting.files import write_tensors

TRUSTED = ("lirpa_ext.models.architectures:named_network",)
"""Architectures that an untrusted checkpoint may name: they build networks of a fixed list from plain numbers."""

_FORMERLY = {"lirpa_ext.training.architectures:named_network": TRUSTED[0]}  # in files of earlier versions

_LONGEST, _MOST = 200, 16  # characters of a name, and entries of a list, in a checkpoint that is not trusted
_KEYS = {"architecture", "kwargs", "state_dict"}


def save_model(model: nn.Module, path: str | Path, architecture: str, **kwargs: Any) -> None:
    """Save a checkpoint that `load_model` can open: the state dict, and how to build the model.

    Args:
        model: The model.
        path: File to write.
        architecture: ``package.module:callable``; ``callable(**kwargs)`` builds a model with the same parameters.
        **kwargs: Arguments of the callable: numbers, strings, and lists or dicts of them.

    Raises:
        DataError: The architecture cannot be built, or the state dict does not fit it.
        ResultsError: The file cannot be written.
    """
    state = model.state_dict()
    _fill(_build(architecture, kwargs), state, architecture)
    write_tensors(path, {"architecture": architecture, "kwargs": kwargs, "state_dict": state})


def load_model(path: str | Path, architecture: str | None = None, trust: bool = False) -> nn.Module:
    """Load a classifier, in eval mode.

    Args:
        path: A ``.onnx`` or ``.onnx.gz`` file, a checkpoint of `save_model`, or a state dict. A softmax at the end of
            an ONNX network is cut off (`lirpa_ext.load_onnx`): the logits predict the same class, with tighter bounds.
        architecture: ``package.module:callable`` that builds the model of a state dict; it takes precedence over the
            one that a checkpoint names. Without it, an untrusted checkpoint may only name those of `TRUSTED`.
        trust: Whether to unpickle a whole module and to build whatever architecture the checkpoint names, default
            False. Both can run any code, so pass True for your own files only.

    Returns:
        The model.

    Raises:
        DataError: The file is missing, truncated, not convertible, or needs `architecture` or `trust`.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise DataError(f"there is no file {str(path)[:200]}")
    if path.suffixes[-1:] == [".onnx"] or path.suffixes[-2:] == [".onnx", ".gz"]:
        from ..importer import load_onnx

        return load_onnx(path, logits=True)
    _check_unpacked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise _corrupt(path, error) from error
        raise DataError(
            f"{path} is no plain checkpoint: it is corrupt, or holds pickled objects such as a whole module. "
            "Save it by lirpa_ext.models.loading.save_model, or pass trust (--trust) if the file is your own. "
            f"({_describe(error)})"
        ) from error
    except Exception as error:  # zip, pickle and torch raise whatever comes on a truncated file
        raise _corrupt(path, error) from error
    if isinstance(content, nn.Module):
        return content.eval()
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a checkpoint or a state dict")
    return _from_checkpoint(path, content, architecture, trust)


def _from_checkpoint(path: Path, content: Mapping[str, Any], architecture: str | None, trust: bool) -> nn.Module:
    ours = content.keys() >= _KEYS
    state = content.get("state_dict", content)
    named = content["architecture"] if ours else None
    named = _FORMERLY.get(named, named) if isinstance(named, str) else named
    if architecture is None and named is None:
        raise DataError(f"{path} is a state dict: say what it fits by --arch package.module:callable")
    if ours and not (isinstance(named, str) and len(named) < _LONGEST):
        raise DataError(f"{path} is no plain checkpoint: its architecture is no name of one")
    if architecture is None and not trust and named not in TRUSTED:
        raise DataError(
            f"{path} asks to build {named!r}, and a file that is not trusted may name any code: if you know "
            f"it, pass --arch {named}, or --trust"
        )
    kwargs = content["kwargs"] if ours and architecture in (None, named) else {}
    if not isinstance(state, Mapping) or not isinstance(kwargs, Mapping):
        raise DataError(f"{path}: the state dict is a {type(state).__name__}, kwargs are a {type(kwargs).__name__}")
    name = architecture or str(named)
    if name in TRUSTED:
        if not trust and not all(_is_plain(value) for value in kwargs.values()):
            raise DataError(f"{path} is no plain checkpoint: it builds {name} from other values than numbers and words")
        _check_sizes(state, name, kwargs)
    return _fill(_build(name, kwargs), state, name).eval()


def _is_plain(value: Any) -> bool:
    """Whether a value is None, a number, a short string, or a short list or dict of these."""
    if isinstance(value, dict):
        return len(value) < _MOST and all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return len(value) < _MOST and all(
            not isinstance(part, list | tuple | dict) and _is_plain(part) for part in value
        )
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < _LONGEST)


def _check_sizes(state: Mapping[str, Any], name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise DataError unless the tensors of a state dict fit the network; checked before memory is allocated."""
    with torch.device("meta"):
        expected = {key: value for key, value in _build(name, kwargs).state_dict().items()}
    for key in {*expected, *state}:
        value = state.get(key)
        if not isinstance(value, Tensor) or key not in expected or value.shape != expected[key].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"the state dict does not fit {name!r}: {str(key)[:80]} is {shape}, expected "
                f"{tuple(expected[key].shape) if key in expected else 'none'}"
            )
        if value.is_floating_point() != expected[key].is_floating_point():
            raise DataError(f"the state dict does not fit {name!r}: {key} is of {value.dtype}")
        if value.is_sparse or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise DataError(f"the state dict holds {key} by fewer numbers than its shape {tuple(value.shape)} has")


def _check_unpacked(path: Path) -> None:
    """Raise DataError for an archive with compressed parts (torch writes none): it may unpack to an enormous size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise _corrupt(path, error) from error
    if unpacked > path.stat().st_size:
        raise DataError(f"{path} of {path.stat().st_size} bytes would unpack to {unpacked}: torch writes no such file")


def _build(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    module, _, name = architecture.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)(**kwargs)
    except Exception as error:  # a user's code
        raise DataError(
            f"architecture {architecture!r} cannot be built: {_describe(error)}. It must be "
            "package.module:callable, and the callable must return a torch module."
        ) from error
    if not isinstance(model, nn.Module):
        raise DataError(f"architecture {architecture!r} gave a {type(model).__name__}, not a torch module")
    return model


def _fill(model: nn.Module, state: Mapping[str, Any], architecture: str) -> nn.Module:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"the state dict does not fit {architecture!r}: {str(error)[:1000]}") from error
    return model


def _corrupt(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is truncated or no checkpoint: {_describe(error)}")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
