"""Robust Bird: train a dense network cheaply until its early-bird ticket emerges, then train the ticket adversarially.

    python train_eb.py --stage1 sgd --stage2 pgd --arch resnet18 --data data/cifar10 --pruning unstructured --density 0.2

Stage by stage in ``utils/robust_bird.py``. ``--help`` lists the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils.installed  # noqa: F401
from utils.config_rb import EarlyBirdSettings
from utils.errors import run_command
from utils.robust_bird import main as two_stages


def main() -> None:
    two_stages(EarlyBirdSettings, (__doc__ or "").splitlines()[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
