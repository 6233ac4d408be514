"""Checkpoints: tensors and plain values, written whole or not at all, loaded without running
code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from torch import Tensor, nn

from utils.errors import BrokenCheckpointError, InputError
from utils.storage.files import write_atomically
from utils.storage.packing import expand

FORMAT = 1
# Lists in lists, as no checkpoint has them; how often a file may hold its tensors (tied weights,
# averages), and what is small anyway.
_DEEPEST, _MOST_REPEATED, _SMALL = 100, 4, 1 << 24
# Plain numbers as numpy writes them, which older code kept beside its weights.
_NUMPY_SCALARS: list[Any] = [
    numpy_scalar,
    np.dtype,
    *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
]
# What other code keeps a network's state dict in, and puts before its names.
_CONTAINERS = ("model_state_dict", "net", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def save_checkpoint(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint with a checksum of what it holds.

    Serialized in memory first, so that a failing disk raises ``OSError`` and leaves ``path`` as it
    was.

    Args:
        path: of the file.
        content: tensors and plain values by name.
        keep: where the checkpoint that ``path`` held before stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "checksum": checksum(content)}, buffer)

    def before() -> None:
        if keep is not None and path.exists():
            _keep(path, keep)

    # what can fail comes first: until then both old files stay what they were
    write_atomically(path, buffer.getbuffer(), before)


def _keep(path: Path, keep: Path) -> None:
    """A second name for the file at ``path``, which thus exists at every moment."""
    temporary = keep.with_name(f".{keep.name}-{os.getpid()}")
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, keep)
    finally:
        temporary.unlink(missing_ok=True)


def snapshot(content: Any) -> Any:
    """The same with copies of its tensors on the CPU, which training does not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {name: snapshot(part) for name, part in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(snapshot(part) for part in content)
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """A digest of tensors (type, shape, bits) and plain values, in their order and by name;
    ``format`` and itself apart."""
    digest = hashlib.blake2b(digest_size=16)
    _digest(
        {name: value for name, value in content.items() if name not in ("format", "checksum")},
        digest,
    )
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        # By numpy: a thread that uses torch's OpenMP beside the training leaves it slow for good.
        tensor = value.detach().cpu()
        tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8))
    elif isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for name, part in value.items():
            digest.update(repr(name).encode())
            _digest(part, digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _digest(part, digest)
    else:
        digest.update(repr(value).encode())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, loaded with ``weights_only=True``.

    Raises:
        InputError: no such file, or one that would have to run code to load.
        BrokenCheckpointError: not a checkpoint, or one whose content is not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such checkpoint: {path}")
    _refuse_odd_records(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower() and not _is_damaged(path):
            raise InputError(
                f"{path} holds more than tensors and plain values and is not loaded, since that"
                " could run code"
            ) from error
        raise BrokenCheckpointError(f"{path} is not a checkpoint, or a broken one") from error
    except Exception as error:
        # a damaged archive fails in as many ways as zip, pickle and storage can
        raise BrokenCheckpointError(f"{path} is not a checkpoint, or a broken one") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no dict with state_dict")
    if odd := _oddity(content, path.stat().st_size):
        raise InputError(f"{path} is no checkpoint: {odd}")
    version = content.get("format", FORMAT)
    if type(version) is not int or version != FORMAT:
        raise InputError(f"{path} has format {repr(version)[:40]} and this version reads {FORMAT}")
    if "checksum" in content and content.pop("checksum") != checksum(content):
        raise BrokenCheckpointError(f"{path} is broken: it does not hold what was written into it")
    try:
        return expand(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BrokenCheckpointError(
            f"{path} is broken: its packed weights do not fit its masks"
        ) from error


def _oddity(content: Any, size: int) -> str | None:
    """What in the content of a file of ``size`` bytes could not be walked through, or would take
    far more memory than the file."""
    waiting: list[tuple[Any, int]] = [(content, 0)]
    values, memory = 0, 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                return "it holds a sparse, quantized or otherwise odd tensor"
            memory += value.numel() * value.element_size()
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            waiting += [
                (part, depth + 1)
                for part in (value.values() if isinstance(value, Mapping) else value)
            ]
        if depth > _DEEPEST:
            return f"its lists lie in each other more than {_DEEPEST} deep"
        if memory > _MOST_REPEATED * size + _SMALL:  # one stored number can be a tensor of any size
            return "its tensors are far larger than the file"
        if values + len(waiting) > size + 100_000:  # a list can hold another many times
            return "it holds more values than the file has bytes"
    return None


def _refuse_odd_records(path: Path) -> None:
    """``BrokenCheckpointError`` for an archive whose headers promise more than the file has: a
    small file can unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:
        # no archive, or a damaged one: torch.load says so, and reads its own older format
        return
    # torch writes none
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > path.stat().st_size:
        why = (
            "it holds compressed records" if compressed else "its records are larger than the file"
        )
        raise BrokenCheckpointError(f"{path} is not a checkpoint, or a broken one: {why}")


def _is_damaged(path: Path) -> bool:
    """Whether a record's bytes are not those that were written: a flipped bit can look like a call
    of code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return zipfile.is_zipfile(path)
    except Exception:  # an archive that cannot be walked through
        return True


def load_newest(newest: Path, previous: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The newest of a run's two checkpoints that is whole, its file, and a warning if that is not
    the newest of all.

    Raises:
        InputError: there is none, or none that is whole.
    """
    if not newest.exists() and not previous.exists():
        raise InputError(f"no such checkpoint: {newest}")
    troubles = []
    for path in (newest, previous):
        try:
            content = load_checkpoint(path)
        except BrokenCheckpointError as error:
            troubles.append(str(error))
        except InputError as error:
            # whole, but not for this version, or not safe: no reason to take an older one
            if path.exists():
                raise
            troubles.append(str(error))
        else:
            return (
                content,
                path,
                f"{troubles[0]}; going on from {path.name}, the one before" if troubles else None,
            )
    raise InputError(
        f"{'; '.join(troubles)}: this run cannot be resumed; another --save_dir starts anew"
    )


def network_weights(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The network's state dict in a checkpoint, of ours or another's; a warning says in one line
    what was taken off (``unwrapped``)."""
    notes: list[str] = []
    if content.get("network") is not None:  # ours: its names are the network's
        state = content.get("state_dict", content)
    else:
        try:
            state, notes = unwrapped(content)
        except ValueError as error:
            raise InputError(f"{path} {error}") from error
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise InputError(f"{path} holds no state_dict with tensors")
    if notes:
        # of this line, so that a text comes once
        warnings.warn(f"{path}: {', '.join(notes)}", stacklevel=1)
    return dict(state)


def unwrapped(state: Any) -> tuple[Any, list[str]]:
    """A network's own state dict without what others wrap around it, and what that was.

    Opened: ``state_dict``, ``model_state_dict``, ``net``, ``model``. Taken off: the count of SWA's
    ``AveragedModel`` and the prefixes of DataParallel, ``torch.compile`` and Lightning where all
    names have one. Weights that ``torch.nn.utils.prune`` split are multiplied.

    Raises:
        ValueError: more than one network, or half of a pruned weight.
    """
    notes: list[str] = []
    for _ in range(10):  # more than anyone wraps; a dict may hold itself
        if not isinstance(state, Mapping):
            break
        if "state_dict" in state:
            state = state["state_dict"]
            continue
        opened = [name for name in _CONTAINERS if isinstance(state.get(name), Mapping)]
        if len(opened) > 1:
            raise ValueError(
                f"holds networks under {' and '.join(opened)}: keep the one that is meant"
            )
        prefix = next(
            (p for p in _PREFIXES if state and all(str(name).startswith(p) for name in state)), None
        )
        if opened:
            state = state[opened[0]]
            notes.append(f"opened {opened[0]}")
        elif "n_averaged" in state:
            state = {name: value for name, value in state.items() if name != "n_averaged"}
            notes.append("dropped n_averaged")
        elif prefix:
            state = {name.removeprefix(prefix): value for name, value in state.items()}
            notes.append(f"stripped {prefix}")
        else:
            break
    if isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        state, pruned = _multiplied(state)
        notes += [f"multiplied {pruned} pruned weights by their masks"] if pruned else []
    return state, notes


def _multiplied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Every ``X_orig`` and ``X_mask`` as their product ``X``, and how many there were;
    ``ValueError`` names a half alone."""
    state, pruned = dict(state), 0
    for name in list(state):
        base = name.removesuffix("_orig")
        if base != name and f"{base}_u" not in state:  # with _u and _v it is torch's spectral norm
            if f"{base}_mask" not in state or base in state:
                raise ValueError(
                    f"has {name} {f'and {base}' if base in state else f'without {base}_mask'}: not"
                    " a pruned weight"
                )
            weight, mask = state.pop(name), state.pop(f"{base}_mask")
            if weight.shape != mask.shape:
                raise ValueError(
                    f"has {name} of shape {list(weight.shape)} and a mask of shape"
                    f" {list(mask.shape)}"
                )
            state[base] = weight * mask.to(weight.dtype)
            pruned += 1
    for name in state:
        if name.endswith(("weight_mask", "bias_mask")):
            raise ValueError(
                f"has {name} without {name.removesuffix('_mask')}_orig: not a pruned weight"
            )
    return state, pruned


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, arch: str
) -> None:
    """Load a state dict whole; ``InputError`` names the first difference if it is of another
    network.

    What other code leaves out or shapes otherwise without another meaning is taken: batch norms
    without ``num_batches_tracked``, and a normalization of shape ``[1, C, 1, 1]``.
    """
    tensors = model.state_dict()
    own = {name: tuple(value.shape) for name, value in tensors.items()}
    state = _with_own_prefix(own, state)
    for name, shape in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(tensors[name]))
        elif (
            name in ("normalize.mean", "normalize.std")
            and name in state
            and state[name].shape == (1, *shape, 1, 1)
        ):
            state[name] = state[name].reshape(shape)
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    if own != theirs:
        raise InputError(
            f"{path} is not a checkpoint of this {arch}: {_first_difference(own, theirs)}"
        )
    model.load_state_dict(state)


def _with_own_prefix(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network that is itself all in a ``model`` or ``module``, with the prefix
    that ``unwrapped`` took off."""
    for prefix in _PREFIXES:
        if (
            own
            and all(name.startswith(prefix) for name in own)
            and not any(name.startswith(prefix) for name in state)
        ):
            return {prefix + name: value for name, value in state.items()}
    return dict(state)


def refuse_unfit_training_state(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, naming the first, for tensors of the optimizer or masks that are not
    shaped like their weights."""
    parameters = list(model.named_parameters())
    for number, state in content["optimizer"]["state"].items():
        name, parameter = (
            parameters[number]
            if type(number) is int and 0 <= number < len(parameters)
            else (number, None)
        )
        for kind, value in state.items():
            if parameter is None or (
                isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape
            ):
                raise ValueError(f"the optimizer's {kind} of {name} is not shaped like its weight")
    shapes = {name: parameter.shape for name, parameter in parameters}
    masked = "masks" in (content.get("masking") or {})  # of channels there are none
    for kind in ("masks", "explored") if masked else ():
        for name, mask in content["masking"][kind].items():
            if (
                not isinstance(mask, Tensor)
                or mask.dtype != torch.bool
                or mask.shape != shapes.get(name)
            ):
                raise ValueError(f"{kind} of {name} are not bool and shaped like its weight")


def _first_difference(
    own: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> str:
    for name, shape in own.items():
        if name not in theirs:
            return f"it has no {name}"
        if theirs[name] != shape:
            return f"{name} has shape {list(theirs[name])} there and {list(shape)} here"
    return f"it also has {next(name for name in theirs if name not in own)}"
