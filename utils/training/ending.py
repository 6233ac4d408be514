"""Messages of a run that ends early: why, and from which checkpoint it can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from utils.errors import InputError, RunError, Stopped
from utils.execution.distributed import World, lost_another
from utils.storage.run_folder import RunFolder
from utils.training.saving import Checkpoints


@contextlib.contextmanager
def saying_how_it_ends(
    folder: RunFolder,
    world: World,
    device: torch.device,
    where: Callable[[], str],
    checkpoints: Checkpoints,
) -> Iterator[None]:
    """Add the last good checkpoint to the message of a run that ends early, and ``where()`` to that
    of a failure. Raises ``RunError`` for what the run cannot go on after."""
    name = world.name

    def last_good() -> str:
        # Only the first process knows what has been written.
        return checkpoints.text(with_progress=world.is_first)

    def goes_on() -> str:
        return "; --resume continues from there" if checkpoints.exist() else ""

    try:
        yield
    except Stopped as stopped:
        folder.say(f"{stopped}; {last_good()}{goes_on()}")
        raise
    except KeyboardInterrupt:
        folder.say(f"interrupted; {last_good()}{goes_on()}")
        raise
    except (RunError, InputError) as error:
        # Once training has begun, a failing input is a failed run.
        raise RunError(f"{name}{where()}{error}; {last_good()}") from error
    except (MemoryError, RuntimeError) as error:
        # a CPU's allocator raises a plain RuntimeError
        kinds = (MemoryError, torch.OutOfMemoryError)
        if isinstance(error, kinds) or "can't allocate memory" in str(error):
            out = f"{name}out of memory on {device}; lower --batch_size"
            raise RunError(f"{out}; {last_good()}") from error
        if world.size == 1 or not lost_another(error):
            raise
        lost = f"{name}another process of this run has ended"
        raise RunError(f"{lost}; {last_good()}") from error
