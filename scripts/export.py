"""Exports a trained network to a file for other programs: ``python scripts/export.py CHECKPOINT
--format onnx [--out FILE]``.

It includes normalization and takes batches of any size; channel-pruned networks stay narrow,
except in a state_dict. The file is read back and compared with the network before it is
kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import arch_names
from utils.errors import run_command
from utils.export import FORMATS, export
from utils.settings.command_line import OneLineParser


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0], allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="ours, our safetensors, or a state dict of the paper's code",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=list(FORMATS),
        help="state_dict: flat, full size, pruned weights are zero",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: beside the checkpoint, with another suffix",
    )
    plain = parser.add_argument_group("for a state dict, which does not describe its network")
    plain.add_argument("--arch", choices=arch_names())
    plain.add_argument("--num_classes", type=int, metavar="N")
    plain.add_argument(
        "--width", type=float, metavar="FACTOR", help="channel multiplier (default 1)"
    )
    plain.add_argument("--depth_factor", type=int, metavar="N", help="WRN depth (default 34)")
    plain.add_argument("--width_factor", type=int, metavar="N", help="WRN widening (default 10)")
    plain.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="side of the images (default 32)"
    )
    given = vars(parser.parse_args())
    path, difference = export(
        given.pop("checkpoint"), given.pop("format"), given.pop("out"), **given
    )
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, logits within {difference:.0e} of the"
        " network's, relative to the largest"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
