"""Explains a network with Grad-CAM, saliency and a loss landscape: ``python scripts/explain.py
CHECKPOINT [--out DIR] [flags of main_adv.py --eval]``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from tqdm import tqdm

from utils.errors import require, run_command
from utils.evaluation.command import network_and_data, stored_settings
from utils.evaluation.explain import captum_methods, explain
from utils.execution.hardware import full_precision
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import OneLineParser, parse_settings
from utils.settings.device import pick_device
from utils.settings.rules import refuse_flags
from utils.storage.files import json_bytes, writable_folder, write_atomically, write_figure
from utils.storage.provenance import environment

_MOST_IMAGES = 100  # rows that a figure can still hold
# Flags of an evaluation that concern other attacks, other images, or where results are saved.
_IDLE = "eval_attack restarts source eval_dir time_limit train_subset".split()


def main() -> None:
    checkpoint, arguments, settings = _read(sys.argv[1:])
    captum_methods()  # fails before anything is computed or written
    device = pick_device(settings)
    evaluated, data = network_and_data(settings, device)
    images = len(data.test)
    require(
        arguments.explain_images <= images,
        f"--explain_images {arguments.explain_images}: there are {images} test images",
    )
    channels = data.image_shape[0]
    require(channels in (1, 3), f"images of {channels} channels cannot be shown; 1 or 3 can")
    folder = writable_folder(
        Path(arguments.out) if arguments.out is not None else checkpoint.parent / "explain",
        "--out DIR",
    )

    for caution in (*settings.notes, *settings.attack_cautions("test")):
        print(f"note: {caution}")
    attack, name = settings.test_attack, f"PGD-{settings.test_step}"
    with (
        full_precision(),
        tqdm(
            total=arguments.grid**2, desc="loss landscape", unit="point", leave=False, disable=None
        ) as bar,
    ):
        options = {
            "images": arguments.explain_images,
            "grid": arguments.grid,
            "seed": settings.seed,
        }
        found = explain(evaluated.model, data.test, attack, on_point=bar.update, **options)
    require(
        bool(found.losses.isfinite().all()),
        f"the losses of {checkpoint}, or around it, are not finite",
    )

    from utils.evaluation.explain_figures import landscape_figure, saliency_figure

    title = (
        f"{checkpoint.resolve().parent.name}/{checkpoint.name}; {name}, {attack.norm}, eps"
        f" {settings.test_eps:g}/255"
    )
    write_figure(folder / "saliency.png", saliency_figure(found, data.classes, name, title))
    write_figure(folder / "landscape.png", landscape_figure(found, name, title))
    content = {
        "checkpoint": str(checkpoint),
        "settings": dataclasses.asdict(settings),
        **found.figures(data.classes),
    }
    write_atomically(folder / "explain.json", json_bytes({**content, **environment(device)}))
    print(f"saliency.png, landscape.png and explain.json are in {folder}")


def _read(command_line: Sequence[str]) -> tuple[Path, argparse.Namespace, AdversarialSettings]:
    """The checkpoint, this script's flags and the evaluation's settings; raises ``InputError``."""
    usage = (
        "%(prog)s CHECKPOINT [flags of main_adv.py --eval] [--out DIR] [--explain_images N]"
        " [--grid N]"
    )
    parser = OneLineParser(
        description=(__doc__ or "").split(":")[0], usage=usage, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the pictures (default: explain/ beside the checkpoint)",
    )
    parser.add_argument(
        "--explain_images",
        "--explain-images",
        type=int,
        default=6,
        metavar="N",
        help="test images shown (default 6)",
    )
    parser.add_argument(
        "--grid",
        type=int,
        default=15,
        metavar="N",
        help="points per side of the landscape, odd (default 15)",
    )
    arguments, rest = parser.parse_known_args(command_line)
    require(
        bool(rest) and not rest[0].startswith("-"),
        "the checkpoint comes first: explain.py CHECKPOINT [flags]",
    )
    shown, grid = arguments.explain_images, arguments.grid
    require(
        1 <= shown <= _MOST_IMAGES,
        f"--explain_images must be from 1 to {_MOST_IMAGES}, not {shown}",
    )
    require(
        grid >= 3 and grid % 2 == 1,
        f"--grid must be odd, so that the network is its centre, and at least 3, not {grid}",
    )
    given: dict[str, Any] = {}

    def stored(flags: Mapping[str, Any]) -> Mapping[str, Any]:
        given.update(flags)
        return stored_settings(flags)

    settings = parse_settings(
        AdversarialSettings, ["--eval", "--pretrained", *rest], parser.description or "", stored
    )
    refuse_flags(given, _IDLE, "explain.py")
    require(
        settings.pretrained == rest[0],
        "--pretrained has no effect with explain.py, whose first argument is the checkpoint",
    )
    return Path(rest[0]), arguments, settings


if __name__ == "__main__":
    sys.exit(run_command(main))
