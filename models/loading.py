"""Networks by their description: what settings and data ask for, what a checkpoint carries,
channels removed included."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
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
from utils.storage.safetensors import SUFFIX, load_safetensors

# What a description may say at all, and from where on it is looked at more closely before it is
# given memory.
_RANGES = {
    "num_classes": (1, 2**24),
    "image_size": (1, 4096),
    "width": (0.0, 64.0),
    "depth_factor": (1, 1000),
    "width_factor": (1, 100),
}
_USUAL = {"num_classes": 1000, "width": 2.0, "depth_factor": 50, "width_factor": 16}
_LEAST_KEPT = 1e-3  # share of a network's numbers, without channels, from which nobody goes below
_MODELS = ("model.pt", "model.safetensors")  # in the folder of one: packed, of the Hub
# of a description: what a full-size, nameless network does not have
_NOT_BUILT = frozenset({"channels", "classes"})


def spec_in(content: Mapping[str, Any], path: object) -> dict[str, Any] | None:
    """What a checkpoint says of its network, None if nothing (the paper's code); ``InputError`` if
    that makes no sense."""
    spec = content.get("network")
    if spec is None:
        return None
    kinds = {
        "arch": str,
        "num_classes": int,
        "mean": list,
        "std": list,
        "width": float,
        "image_size": int,
    }
    kinds |= {"depth_factor": int, "width_factor": int}
    if isinstance(spec, Mapping) and "kept" in spec:
        raise InputError(
            f"{path} is of an older version, in which each batch norm picked its own channels"
        )
    known = isinstance(spec, Mapping) and spec.keys() - _NOT_BUILT == kinds.keys()
    if not known or not all(isinstance(spec[name], kind) for name, kind in kinds.items()):
        raise InputError(f"{path} does not say which network it holds")
    if wrong := [
        name for name, (least, most) in _RANGES.items() if not least <= spec[name] <= most
    ]:
        raise InputError(f"{path} describes a network that cannot be: {wrong[0]} {spec[wrong[0]]}")
    if not all(
        isinstance(number, (int, float)) and math.isfinite(number)
        for number in (*spec["mean"], *spec["std"])
    ):
        raise InputError(f"{path} does not hold the mean and the standard deviation of its pixels")
    if not _says_what_is_removed(spec):
        raise InputError(f"{path} does not say which channels its network kept")
    classes = spec.get("classes")
    named = classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )
    if not named or (classes is not None and len(classes) != spec["num_classes"]):
        raise InputError(f"{path} does not name each of its {spec['num_classes']} classes")
    return dict(spec)


def _says_what_is_removed(spec: Mapping[str, Any]) -> bool:
    """``channels``: by layer those of its outputs and inputs that stay, or None for all."""
    channels = spec.get("channels", {})
    if not isinstance(channels, Mapping):
        return False
    if not all(isinstance(sides, list) and len(sides) == 2 for sides in channels.values()):
        return False
    return all(
        isinstance(side, list) and all(type(channel) is int for channel in side)
        for sides in channels.values()
        for side in sides
        if side is not None
    )


def full_size(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the network before channels were removed."""
    return {name: value for name, value in spec.items() if name != "channels"}


@torch.no_grad()
def full_size_state(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights in the shapes of the full-size one, for programs that know no other.

    Args:
        spec: description of the network.
        state: its state dict.

    Returns:
        A state dict of the full-size network, with zeros where channels were removed, and variance
        1 in their statistics.
    """
    if "channels" not in spec:
        return dict(state)
    full = build_network(full_size(spec), torch.device("cpu"))
    numbered = copy.deepcopy(full).double()  # exact up to 2^53 positions
    for value in numbered.state_dict().values():
        value.copy_(torch.arange(value.numel()).view(value.shape))
    # removing channels of numbers instead of weights tells where each weight comes from
    positions = narrow(numbered, spec["channels"]).state_dict()
    spread = {}
    for name, value in full.state_dict().items():
        fill = 1 if name.endswith("running_var") else 0
        whole = torch.full((value.numel(),), fill, dtype=state[name].dtype)
        whole[positions[name].long().flatten()] = state[name].cpu().flatten()
        spread[name] = whole.view(value.shape)
    return spread


def refuse_other_classes(path: object, spec: Mapping[str, Any], classes: Sequence[str]) -> bool:
    """Compare the names of the classes, where a checkpoint's ``spec`` has them, with those of the
    data.

    Returns:
        Whether the network numbers them as the data does.

    Raises:
        InputError: they are not the same classes.
    """
    known = spec.get("classes") or list(classes)
    if sorted(known) != sorted(classes):
        if len(known) != len(classes):
            raise InputError(f"{path} knows {len(known)} classes and the data has {len(classes)}")
        theirs, ours = (
            [name for name in one if name not in other][:3]
            for one, other in ((known, classes), (classes, known))
        )
        raise InputError(
            f"{path} knows other classes than the data: {', '.join(theirs)} and not"
            f" {', '.join(ours)}"
        )
    return known == list(classes)


def build_network(spec: Mapping[str, Any], device: torch.device, seed: int = 1) -> nn.Module:
    """A fresh network on ``device``.

    Args:
        spec: arguments of ``build_model``, and for a network without some of its channels
            ``channels``: those of each layer that stay (``models.channels``). Names of ``classes``
            may lie beside them.
        device: where it goes, channels-last.
        seed: of its weights.

    Raises:
        InputError: a network that cannot be built so.
    """
    try:
        model = build_model(
            **{name: value for name, value in spec.items() if name not in _NOT_BUILT}, seed=seed
        )
        model = narrow(model, spec.get("channels", {}))
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (ValueError, RuntimeError, OverflowError) as error:
        # a size it cannot have, or more memory than there is
        raise InputError(f"this network cannot be built ({one_line(error)})") from error


def network_of(
    content: Mapping[str, Any], path: object, spec: Mapping[str, Any], device: torch.device
) -> nn.Module:
    """The network that a checkpoint's ``content`` (from ``path``) holds, built by ``spec``;
    ``InputError`` if it is another one."""
    _refuse_larger_than_its_file(content, path, spec)
    model = build_network(spec, device)
    load_weights(model, network_weights(content, str(path)), str(path), spec["arch"])
    return model


def _refuse_larger_than_its_file(
    content: Mapping[str, Any], path: object, spec: Mapping[str, Any]
) -> None:
    """A description can ask for any memory; an unusual one is first built without."""
    if spec["arch"] in CUSTOM_ARCHITECTURES or all(
        spec[name] <= most for name, most in _USUAL.items()
    ):
        return
    try:
        with torch.device("meta"):
            model = build_model(
                **{name: value for name, value in spec.items() if name not in _NOT_BUILT}
            )
    except (ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: this network cannot be built ({one_line(error)})") from error
    asked = sum(value.numel() for value in model.state_dict().values())
    held = sum(value.numel() for value in network_weights(content, str(path)).values())
    if asked * (_LEAST_KEPT if "channels" in spec else 1) > held:
        raise InputError(f"{path} describes a network of {asked} numbers and holds {held}")


def stored_network(path: str | Path, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a file with a network, and what the network is.

    Args:
        path: a checkpoint of ours (masked, packed or narrow), our safetensors, or a state dict such
            as the paper's code wrote.
        given: for a file that does not describe its network: ``arch``, ``num_classes`` and whatever
            of ``width``, ``depth_factor``, ``width_factor`` and ``image_size`` is unusual. None
            counts as not given.

    Raises:
        InputError: no such file, a broken one, one that needs a description, or one that has it
            already.
    """
    content = load_safetensors(path) if str(path).endswith(SUFFIX) else read_checkpoint(path)
    given = {name: value for name, value in given.items() if value is not None}
    spec = spec_in(content, path)
    if spec is None:
        return content, _described(content, path, given)
    if given:
        raise InputError(
            f"{path} says itself which network it holds; {', '.join(given)} could not take effect"
        )
    return content, spec


def _described(
    content: Mapping[str, Any], path: object, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A description from what is ``given`` and, for the pixels, from the weights."""
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
    """A trained network in eval mode: images ``[N, C, H, W]``, float32 pixels in [0, 1], to logits
    ``[N, num_classes]``.

    Args:
        path_or_url: a checkpoint of ours (masked, packed or narrow), a safetensors file that
            ``scripts/export.py`` wrote, or a state dict, such as the paper's code and ``--format
            state_dict`` write; or a folder of one model, as in ``results/models``. What a URL names
            is downloaded once, into ``torch.hub``'s folder, or our cache of a user who has no home.
            Nothing in a file is run.
        device: where the network goes.
        arch, num_classes: of a state dict, which does not say them (``build_model``).
        width, depth_factor, width_factor: of a state dict whose network has not the usual ones.

    Raises:
        utils.errors.InputError: no such file, nothing at the URL, a broken file, another network
            than described, or a description for a file that has its own.
    """
    path = _downloaded(path_or_url) if "://" in str(path_or_url) else Path(path_or_url)
    if path.is_dir():  # where there is no model, the folder is refused as what it is
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
    """Where what is at ``url`` is kept; fetched if it is not there yet."""
    name = PurePosixPath(unquote(urlparse(str(url)).path)).name
    # The best model of every run has one file name, so the address goes into the name here.
    path = (
        _hub_folder()
        / "checkpoints"
        / f"{hashlib.sha256(str(url).encode()).hexdigest()[:8]}_{name}"
    )
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(str(url), str(path), progress=False)
        except (OSError, ValueError) as error:
            # urllib's errors are OSErrors; a URL it cannot read is a ValueError
            raise InputError(f"cannot download {url} ({one_line(error)})") from error
    return path


def _hub_folder() -> Path:
    from data.sources import default_cache

    folder = Path(torch.hub.get_dir())
    # Of a user without a home, torch takes "~" for the name of a folder, or the root folder for the
    # home.
    if folder.parts[0] == "~" or (
        os.environ.get("HOME") == "" and folder.parts[:2] == ("/", ".cache")
    ):
        return default_cache()
    return folder
