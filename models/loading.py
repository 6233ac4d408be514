"""Building networks from descriptions, with removed channels, and loading them from files."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor, nn

from models.build import CUSTOM_ARCHITECTURES, build_model
from models.channels import narrow
from utils.errors import InputError, one_line
from utils.storage.checkpoint import load_weights, network_weights
from utils.storage.inputs import read_checkpoint
from utils.storage.json_files import misfit
from utils.storage.safetensors import SUFFIX, load_safetensors

# The shape of a description (``misfit``); ``channels`` are kept outputs and inputs by layer, None
# for all.
_SHAPE = {"arch": str, "num_classes": int, "mean": [float], "std": [float], "width": float}
_SHAPE |= {"image_size": int, "depth_factor": int, "width_factor": int}
_OPTIONAL = {"channels?": {"*": [([int], None)]}, "classes?": [str], "image_shape?": [int]}
# Valid values of a description, and limits of usual ones: others are checked before memory is
# allocated.
_RANGES = {
    "num_classes": (1, 2**24),
    "image_size": (1, 4096),
    "width": (0.0, 64.0),
    "depth_factor": (1, 1000),
    "width_factor": (1, 100),
}
_USUAL = {"num_classes": 1000, "width": 2.0, "depth_factor": 50, "width_factor": 16}
_LEAST_KEPT = 1e-3  # smallest plausible share of a network's values once channels are removed
_MODELS = ("model.pt", "model.safetensors")  # in a model's folder: packed, or of the Hub
# entries of a description that ``build_model`` does not take
_NOT_BUILT = frozenset({"channels", "classes", "image_shape"})


def spec_in(content: Mapping[str, Any], path: object) -> dict[str, Any] | None:
    """The description of the network in a checkpoint; None without one (the paper's code),
    ``InputError`` if it is invalid."""
    spec = content.get("network")
    if spec is None:
        return None
    wrong = misfit(spec, {**_SHAPE, **_OPTIONAL})
    wrong = wrong or next((n for n in spec.keys() - _SHAPE.keys() - _NOT_BUILT), None)
    if wrong:
        raise InputError(f"{path} does not say which network it holds ({wrong})")
    for name, (least, most) in _RANGES.items():
        if not least <= spec[name] <= most:
            raise InputError(f"{path} describes an impossible network: {name} {spec[name]}")
    if not all(map(math.isfinite, (*spec["mean"], *spec["std"]))):
        raise InputError(f"{path} does not hold the mean and the standard deviation of its pixels")
    if any(len(sides) != 2 for sides in spec.get("channels", {}).values()):
        raise InputError(f"{path} does not say which channels its network kept")
    classes = spec.get("classes")
    if classes is not None and len(classes) != spec["num_classes"]:
        raise InputError(f"{path} does not name each of its {spec['num_classes']} classes")
    return dict(spec)


def full_size(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the network before channels were removed."""
    return {name: value for name, value in spec.items() if name != "channels"}


@torch.no_grad()
def full_size_state(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad a network's weights to full-size shapes, for programs that cannot load narrow networks.

    Args:
        spec: description of the network.
        state: its state dict.

    Returns:
        A state dict of the full-size network. Removed channels are zero, except for their running
        variance, which is 1.
    """
    if "channels" not in spec:
        return dict(state)
    full = build_network(full_size(spec), torch.device("cpu"))
    numbered = copy.deepcopy(full).double()  # exact up to 2^53 positions
    for value in numbered.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.arange(value.numel()).view(value.shape))
    # removing channels from element numbers instead of weights tells where each weight belongs
    positions = narrow(numbered, spec["channels"]).state_dict()
    spread = {}
    for name, value in full.state_dict().items():
        if state[name].shape == value.shape:
            spread[name] = state[name].cpu().clone()
            continue
        fill = 1 if name.endswith("running_var") else 0
        whole = torch.full((value.numel(),), fill, dtype=state[name].dtype)
        whole[positions[name].long().flatten()] = state[name].cpu().flatten()
        spread[name] = whole.view(value.shape)
    return spread


def refuse_other_classes(path: object, spec: Mapping[str, Any], classes: Sequence[str]) -> bool:
    """Compare the class names in a checkpoint's ``spec``, if it has them, with those of the data.

    Returns:
        Whether the network numbers the classes as the data does.

    Raises:
        InputError: the classes are not the same.
    """
    known = spec.get("classes") or list(classes)
    if sorted(known) != sorted(classes):
        if len(known) != len(classes):
            raise InputError(f"{path} has {len(known)} classes but the data has {len(classes)}")
        theirs, ours = (
            [name for name in one if name not in other][:3]
            for one, other in ((known, classes), (classes, known))
        )
        raise InputError(
            f"{path} was trained on other classes than the data: {', '.join(theirs)} and not"
            f" {', '.join(ours)}"
        )
    return known == list(classes)


def build_network(spec: Mapping[str, Any], device: torch.device, seed: int = 1) -> nn.Module:
    """Build a fresh network on ``device``.

    Args:
        spec: arguments of ``build_model``. Optional ``channels`` are those that each layer keeps
            (``models.channels``); optional ``classes`` are ignored.
        device: device of the network, whose weights are channels-last.
        seed: seed of the initial weights.

    Raises:
        InputError: the network cannot be built.
    """
    try:
        model = build_model(
            **{name: value for name, value in spec.items() if name not in _NOT_BUILT}, seed=seed
        )
        model = narrow(model, spec.get("channels", {}))
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (ValueError, RuntimeError, OverflowError) as error:
        # an invalid size, or not enough memory
        raise InputError(f"this network cannot be built ({one_line(error)})") from error


def network_of(
    content: Mapping[str, Any], path: object, spec: Mapping[str, Any], device: torch.device
) -> nn.Module:
    """Build the network ``spec`` with the weights in ``content`` (from ``path``); ``InputError`` if
    they do not match."""
    _refuse_larger_than_its_file(content, path, spec)
    model = build_network(spec, device)
    load_weights(model, network_weights(content, str(path)), str(path), spec["arch"])
    return model


def _refuse_larger_than_its_file(
    content: Mapping[str, Any], path: object, spec: Mapping[str, Any]
) -> None:
    """Raise ``InputError`` if an unusually large network has more values than its file; it is built
    on the meta device first, which allocates no memory."""
    if spec["arch"] in CUSTOM_ARCHITECTURES or all(
        spec[name] <= most for name, most in _USUAL.items()
    ):
        return
    try:
        with torch.device("meta"):
            model = build_network(full_size(spec), torch.device("meta"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    asked = sum(value.numel() for value in model.state_dict().values())
    held = sum(value.numel() for value in network_weights(content, str(path)).values())
    if asked * (_LEAST_KEPT if "channels" in spec else 1) > held:
        raise InputError(f"{path} describes a network of {asked} values but holds {held}")


def stored_network(path: str | Path, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a network's file; returns its content and the description of the network.

    Args:
        path: one of our checkpoints (masked, packed or narrow) or safetensors files, or a state
            dict such as the paper's code writes.
        given: description for a file without one: ``arch``, ``num_classes`` and any unusual
            ``width``, ``depth_factor``, ``width_factor`` or ``image_size``. None counts as not
            given.

    Raises:
        InputError: the file is missing or broken, needs a description, or already has one.
    """
    content = load_safetensors(path) if str(path).endswith(SUFFIX) else read_checkpoint(path)
    given = {name: value for name, value in given.items() if value is not None}
    spec = spec_in(content, path)
    if spec is None:
        return content, _described(content, path, given)
    if given:
        raise InputError(
            f"{path} describes its own network; {', '.join(given)} would have no effect"
        )
    return content, spec


def _described(
    content: Mapping[str, Any], path: object, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A description from ``given`` and, for the mean and std of pixels, from the weights."""
    missing = [name for name in ("arch", "num_classes") if name not in given]
    if missing:
        raise InputError(
            f"{path} does not say which network it holds: give its {' and '.join(missing)}"
        )
    state = network_weights(content, str(path))
    if not {"normalize.mean", "normalize.std"} <= state.keys():
        raise InputError(
            f"{path} holds no network of this project: it has no normalize.mean and normalize.std"
        )
    pixels = {name: state[f"normalize.{name}"].flatten().tolist() for name in ("mean", "std")}
    usual = {"width": 1.0, "depth_factor": 34, "width_factor": 10, "image_size": 32}
    return {**usual, **pixels, **given}


def load_model(
    path_or_url: str | Path,
    device: str | torch.device = "cpu",
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    width: float | None = None,
    depth_factor: int | None = None,
    width_factor: int | None = None,
) -> nn.Module:
    """Load a trained network in eval mode. It maps images ``[N, C, H, W]``, float32 pixels in
    [0, 1], to logits ``[N, num_classes]``.

    Args:
        path_or_url: one of our checkpoints (masked, packed or narrow), a safetensors file written
            by ``scripts/export.py``, or a state dict, such as the paper's code and ``--format
            state_dict`` write; or the folder of a model, as in ``results/models``. A URL is
            downloaded once, into ``torch.hub``'s folder, or our cache if the user has no home. No
            code in a file is executed.
        device: device of the network.
        arch, num_classes: for a state dict, which does not tell them (``build_model``).
        width, depth_factor, width_factor: for a state dict, if they differ from the defaults.

    Raises:
        utils.errors.InputError: no such file, nothing at the URL, a broken file, a network other
            than described, or a description for a file that has its own.
    """
    path = _downloaded(path_or_url) if "://" in str(path_or_url) else Path(path_or_url)
    if path.is_dir():  # a folder without a model is refused on reading
        path = next((path / name for name in _MODELS if (path / name).is_file()), path)
    given = {
        "arch": arch,
        "num_classes": num_classes,
        "depth_factor": depth_factor,
        "width_factor": width_factor,
    }
    content, spec = stored_network(path, **given, width=None if width is None else float(width))
    return network_of(content, path, spec, torch.device(device)).eval()


def _downloaded(url: str | Path) -> Path:
    """The local copy of the file at ``url``, downloaded if it is missing."""
    try:
        name = PurePosixPath(unquote(urlparse(str(url)).path)).name
    except ValueError as error:
        raise InputError(f"{url} is not a URL ({error})") from error
    # The best model of every run has the same file name, so a hash of the URL is put before it.
    path = (
        _hub_folder()
        / "checkpoints"
        / f"{hashlib.sha256(str(url).encode()).hexdigest()[:8]}_{name}"
    )
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(str(url), str(path), progress=False)
        except (OSError, ValueError, HTTPException) as error:
            # urllib's errors are OSErrors; an invalid URL is one of the others
            raise InputError(f"cannot download {url} ({one_line(error)})") from error
    return path


def _hub_folder() -> Path:
    from data.sources import default_cache

    folder = Path(torch.hub.get_dir())
    # Without a home, torch would use a folder named "~", or the root folder.
    if folder.parts[0] == "~" or (
        os.environ.get("HOME") == "" and folder.parts[:2] == ("/", ".cache")
    ):
        return default_cache()
    return folder
