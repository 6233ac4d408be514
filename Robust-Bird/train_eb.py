"""Robust Bird: train densely and cheaply until a ticket emerges, then train it adversarially.

    python train_eb.py --stage1 sgd --stage2 pgd --arch resnet18 --data data/cifar10 \\
        --pruning unstructured --density 0.2

The stages are in ``utils/training/robust_bird.py``. ``--help`` lists the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import run_command
from utils.settings.robust_bird import EarlyBirdSettings
from utils.training.robust_bird import main as two_stages


def main() -> None:
    two_stages(EarlyBirdSettings, (__doc__ or "").splitlines()[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
