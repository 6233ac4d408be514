"""Robust Bird's baseline: like train_eb.py, but the ticket is drawn after exactly --epochs1 epochs.

    python train_base.py --stage1 sgd --epochs1 50 --arch resnet18 --data data/cifar10 \\
        --pruning unstructured --density 0.2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import run_command
from utils.settings.robust_bird import TicketSettings
from utils.training.robust_bird import main as two_stages


def main() -> None:
    two_stages(TicketSettings, (__doc__ or "").splitlines()[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
