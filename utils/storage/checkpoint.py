"""Saving and loading checkpoints: atomic writes, checksums, no code execution on load."""

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
# Limits of a plausible checkpoint: nesting depth, and bytes of all tensors, which may exceed the
# file size (tied weights share storage) by this factor plus this slack.
_DEEPEST, _MOST_REPEATED, _SMALL = 100, 4, 1 << 24
# NumPy scalars, which older code stored beside its weights.
_NUMPY_SCALARS: list[Any] = [
    numpy_scalar,
    np.dtype,
    *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
]
# Keys under which other code stores a state dict, and prefixes that it adds to the names.
_CONTAINERS = ("model_state_dict", "net", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def save_checkpoint(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint, tensors and plain values by name, with a checksum; the previous one moves
    to ``keep``, if given. After an ``OSError``, ``path`` still holds the previous one."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "checksum": checksum(content)}, buffer)

    def before() -> None:
        if keep is not None and path.exists():
            _keep(path, keep)

    # ``keep`` changes only once the new file is on disk: a failed write leaves both old files
    write_atomically(path, buffer.getbuffer(), before)


def _keep(path: Path, keep: Path) -> None:
    """Link or copy ``path`` to ``keep``, so that ``path`` exists at every moment."""
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
    """Copy nested content with its tensors on the CPU, so that training does not change it."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {name: snapshot(part) for name, part in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(snapshot(part) for part in content)
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """Hex digest of names, tensors (dtype, shape, bits) and plain values, in order, without the
    entries ``format`` and ``checksum``."""
    digest = hashlib.blake2b(digest_size=16)
    _digest(
        {name: value for name, value in content.items() if name not in ("format", "checksum")},
        digest,
    )
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        # NumPy, since using torch's OpenMP in a second thread permanently slows down training.
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
    """Load a checkpoint's content onto the CPU with ``weights_only=True``, masked weights unpacked.

    Raises:
        InputError: no such file, or one that would run code, is implausible or has another format.
        BrokenCheckpointError: not a checkpoint, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such checkpoint: {path}")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:  # which says nothing of the file's content
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
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
        raise BrokenCheckpointError(f"{path} is not a checkpoint or is damaged") from error
    except Exception as error:
        # a damaged archive can raise any error of zip, pickle or the tensor storage
        raise BrokenCheckpointError(f"{path} is not a checkpoint or is damaged") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no dict with state_dict")
    if odd := _oddity(content, path.stat().st_size):
        raise InputError(f"{path} is not a checkpoint: {odd}")
    version = content.get("format", FORMAT)
    if type(version) is not int or version != FORMAT:
        raise InputError(f"{path} has format {repr(version)[:40]} and this version reads {FORMAT}")
    if "checksum" in content and content.pop("checksum") != checksum(content):
        raise BrokenCheckpointError(f"{path} is damaged: its checksum does not match its content")
    try:
        return expand(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BrokenCheckpointError(
            f"{path} is broken: its packed weights do not fit its masks"
        ) from error


def _oddity(content: Any, size: int) -> str | None:
    """Say what is implausible about the content of a file of ``size`` bytes: odd tensors, endless
    nesting, or far more data than the file holds. None if nothing is."""
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
            return f"its lists are nested more than {_DEEPEST} deep"
        if memory > _MOST_REPEATED * size + _SMALL:  # one stored number can expand to any size
            return "its tensors are far larger than the file"
        if values + len(waiting) > size + 100_000:  # lists can repeat an item
            return "it holds more values than the file has bytes"
    return None


def _refuse_odd_records(path: Path) -> None:
    """Raise ``BrokenCheckpointError`` for an archive that would unpack to more than its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:
        # not a readable archive: torch.load reports it, or reads its own older format
        return
    # torch never compresses
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > path.stat().st_size:
        why = (
            "it holds compressed records" if compressed else "its records are larger than the file"
        )
        raise BrokenCheckpointError(f"{path} is not a checkpoint or is damaged: {why}")


def _is_damaged(path: Path) -> bool:
    """Whether the archive fails its CRC checks: a flipped bit can look like a pickled call."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return zipfile.is_zipfile(path)
    except Exception:  # too damaged to read
        return True


def load_newest(newest: Path, previous: Path) -> tuple[dict[str, Any], Path, str | None]:
    """Load the newest intact checkpoint of a run: content, file, and a warning if it is the older.

    Raises:
        InputError: none is intact, or the newest intact one is unsafe or of another version.
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
            # intact, but of another version or unsafe: no reason to fall back to an older one
            if path.exists():
                raise
            troubles.append(str(error))
        else:
            older = f"resuming from the previous checkpoint {path.name}"
            return content, path, f"{troubles[0]}; {older}" if troubles else None
    raise InputError(
        f"{'; '.join(troubles)}: this run cannot be resumed; another --save_dir starts a new run"
    )


def network_weights(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Return the network's state dict from a checkpoint of ours or of other code; ``InputError`` if
    it has none. A one-line warning names what ``unwrapped`` removed."""
    notes: list[str] = []
    if content.get("network") is not None:  # ours: nothing to unwrap
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
        # attributed to this line, so that Python shows each text once
        warnings.warn(f"{path}: {', '.join(notes)}", stacklevel=1)
    return dict(state)


def unwrapped(state: Any) -> tuple[Any, list[str]]:
    """Unwrap a network's state dict from other code; returns it with notes on the changes.

    Opens ``state_dict``, ``model_state_dict``, ``net`` and ``model``. Drops the counter of SWA's
    ``AveragedModel``. Strips the prefixes of DataParallel, ``torch.compile`` and Lightning where
    all names have one. Multiplies weights split by ``torch.nn.utils.prune`` with their masks.

    Raises:
        ValueError: several networks, or an incomplete or misshapen pruned weight.
    """
    notes: list[str] = []
    for _ in range(10):  # more than anyone wraps; a dict may contain itself
        if not isinstance(state, Mapping):
            break
        if "state_dict" in state:
            state = state["state_dict"]
            continue
        opened = [name for name in _CONTAINERS if isinstance(state.get(name), Mapping)]
        if len(opened) > 1:
            raise ValueError(f"holds networks under {' and '.join(opened)}: keep the one you mean")
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
    """Replace each pair ``X_orig`` and ``X_mask`` by its product ``X``, and count the pairs;
    ``ValueError`` names an incomplete one."""
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
    """Load a complete state dict; ``InputError`` names the first mismatch with the network.

    Two harmless differences of other code are accepted: batch norms without
    ``num_batches_tracked``, and a normalization of shape ``[1, C, 1, 1]``.
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
    """Restore the prefix that ``unwrapped`` stripped, if all of the network's names have it."""
    for prefix in _PREFIXES:
        if (
            own
            and all(name.startswith(prefix) for name in own)
            and not any(name.startswith(prefix) for name in state)
        ):
            return {prefix + name: value for name, value in state.items()}
    return dict(state)


def refuse_unfit_training_state(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the first optimizer tensor or mask not shaped like its weight."""
    parameters = list(model.named_parameters())
    for number, state in content["optimizer"]["state"].items():
        known = type(number) is int and 0 <= number < len(parameters)
        name, parameter = parameters[number] if known else (number, None)
        for kind, value in state.items():
            if parameter is None or (
                isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape
            ):
                raise ValueError(f"the optimizer's {kind} of {name} is not shaped like its weight")
    shapes = {name: parameter.shape for name, parameter in parameters}
    masked = "masks" in (content.get("masking") or {})  # channel masking has none
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
