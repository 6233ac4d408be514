"""Progress of an epoch on the terminal."""

from __future__ import annotations

from tqdm import tqdm

from utils.storage.run_folder import RunFolder
from utils.training.engine import Progress


class EpochDisplay:
    """A progress bar for one epoch on a terminal, plain lines elsewhere."""

    def __init__(self, folder: RunFolder, title: str, images: int, print_freq: int = 50) -> None:
        self._folder = folder
        self._title = title
        self._print_freq = print_freq
        self._bar = tqdm(
            total=images,
            desc=title,
            unit="img",
            leave=False,
            disable=None if folder.writes else True,
        )
        self._seen = 0

    def __enter__(self) -> EpochDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def training(self, progress: Progress) -> None:
        """Show the progress after some training steps."""
        figures = f"loss {progress.loss:.3f}  acc {progress.accuracy:.2f}"
        if self._bar.disable:
            if progress.step % self._print_freq == 0 and progress.step < progress.steps:
                self._folder.say(
                    f"{self._title} step {progress.step}/{progress.steps}  {figures} "
                    f" {progress.images / max(progress.seconds, 1e-9):.0f} img/s"
                )
            return
        done = round(self._bar.total * progress.step / progress.steps)
        self._bar.update(done - self._seen)
        self._seen = done
        self._bar.set_postfix_str(figures)

    def images(self, count: int) -> None:
        """Advance by ``count`` evaluated images."""
        self._bar.update(count)
