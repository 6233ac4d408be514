"""Which sparsity makes inference on a CPU faster, and which only makes files smaller.

    python benchmarks/inference.py --arch resnet18 --batch 64
    python benchmarks/inference.py --quick

Dense, unstructured (Flying Bird's masks at density .2 and .1) and narrow networks (half and a
quarter of the channels) take turns, first in PyTorch and then in onnxruntime; prints medians and
ratios to dense. The networks are untrained: time does not depend on the weights' values, and
compressed size depends only on the zeros. Float32, channels-last in PyTorch.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timing
import torch
from torch import Tensor, nn

from sparse_core import Masking, MaskingConfig
from utils.errors import run_command
from utils.export import onnx_bytes, onnx_session
from utils.report.tables import unpadded
from utils.storage.files import saved_bytes
from utils.storage.packing import compact

MASKED, NARROW = (0.2, 0.1), (0.5, 0.25)
FILES = ("checkpoint", "float32", "gzip", "xz")
# calls with one image per measurement: a single one is too short to time, and finds the caches as
# the previous network left them
_CALLS = 10
_PAUSE = 0.05  # seconds
_QUICK = {"width": 0.25, "batch": 16, "side": 8, "channels": 1, "repeats": 15, "calls": 10}
Row = dict[str, float]


def main() -> None:
    flags = timing.parser((__doc__ or "").splitlines()[0], trains=False)
    flags.add_argument("--batch", type=int, default=64, help="images at once, for the throughput")
    flags.add_argument("--calls", type=int, default=1, help="batches a measurement")
    flags.set_defaults(device="cpu", repeats=15)
    options = timing.parse(flags, _QUICK)
    made = candidates(options)
    sizes = {name: file_sizes(candidate) for name, candidate in made.items()}
    speed = speeds({name: candidate.model for name, candidate in made.items()}, options)
    if options.json:
        timing.print_json(speed=speed, bytes=sizes)
        return
    print(f"{setting(options)}\n\n{speed_table(speed, options.batch)}\n\n{size_table(sizes)}")


# ---- the networks


@dataclass(frozen=True)
class Candidate:
    """A network in eval mode, with its optimizer and masking."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masking: Masking | None = None

    @classmethod
    def of(cls, model: nn.Module, density: float | None = None) -> Candidate:
        """The network masked to ``density``, or as it is."""
        optimizer = timing.optimizer_of(model)
        return cls(
            model.eval(),
            optimizer,
            None if density is None else Masking(model, optimizer, MaskingConfig(density, 1000)),
        )


def candidates(options: argparse.Namespace) -> dict[str, Candidate]:
    made = {"dense": Candidate.of(timing.network(options))}
    made |= {
        f"Flying Bird, density {density:g}": Candidate.of(timing.network(options), density)
        for density in MASKED
    }
    made |= {
        f"{density:g} of the channels": Candidate.of(timing.narrowed(options, density)[0])
        for density in NARROW
    }
    return made


# ---- size


def file_sizes(candidate: Candidate) -> Row:
    """Bytes of the checkpoint to resume from, and of the float32 state dict, zeros included, plain
    and compressed."""
    state = candidate.model.state_dict()
    weights = saved_bytes({name: value.contiguous() for name, value in state.items()})
    files = {
        "checkpoint": saved_bytes(checkpoint(candidate)),
        "float32": weights,
        "gzip": gzip.compress(weights),
        "xz": lzma.compress(weights),
    }
    return {name: len(file) for name, file in files.items()}


def checkpoint(candidate: Candidate) -> dict[str, object]:
    """Weights, momentum and masks as a run writes them: packed if there are masks."""
    model, optimizer, masking = candidate.model, candidate.optimizer, candidate.masking
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # creates momentum, keeps the weights
    optimizer.step()
    if masking is not None:
        masking.apply()
    optimizer.zero_grad()
    state = {
        "optimizer": optimizer.state_dict(),
        "masking": None if masking is None else masking.state_dict(),
    }
    return compact(
        {"state_dict": model.state_dict(), **state}, [name for name, _ in model.named_parameters()]
    )


# ---- speed


def speeds(networks: Mapping[str, nn.Module], options: argparse.Namespace) -> dict[str, Row]:
    """Milliseconds for one image and images per second in a batch, by network and engine."""
    shape = (options.channels, options.side, options.side)
    one, many = torch.rand(1, *shape), torch.rand(options.batch, *shape)
    rows: dict[str, Row] = {name: {} for name in networks}
    for engine, prepared in ENGINES.items():
        runs = {name: prepared(model, many) for name, model in networks.items()}
        for images, calls in ((one, _CALLS), (many, options.calls)):
            work = {name: repeated(run, images, calls) for name, run in runs.items()}
            ms = timing.alternate(work, options.repeats, options.device, _PAUSE)
            for name, time in ms.items():
                if images is one:
                    rows[name][f"{engine} latency"] = time / calls
                else:
                    rows[name][f"{engine} throughput"] = 1e3 * options.batch * calls / time
    return rows


def with_torch(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images.contiguous(memory_format=torch.channels_last))

    return run


def with_onnxruntime(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    session = onnx_session(onnx_bytes(model, torch.rand(2, *images.shape[1:])))
    return lambda images: session.run(["logits"], {"images": images.numpy()})


def repeated(run: Callable[[Tensor], object], images: Tensor, calls: int) -> Callable[[], object]:
    return lambda: [run(images) for _ in range(calls)]


ENGINES = {"PyTorch": with_torch, "onnxruntime": with_onnxruntime}


# ---- output


def setting(options: argparse.Namespace) -> str:
    size = (
        f"{options.arch} x{options.width:g}, {options.side}x{options.side}, cpu,"
        f" {torch.get_num_threads()} threads"
    )
    return (
        f"{size}, torch {torch.__version__}; initial weights, masks and channels applied; in"
        " brackets the gain over dense"
    )


def speed_table(rows: Mapping[str, Row], batch: int) -> str:
    kinds = {"latency": "1 image", "throughput": f"batch {batch}"}
    columns = [f"{engine} {kind}" for kind in kinds for engine in ENGINES]
    titles = [f"{engine}, {kind}" for kind in kinds.values() for engine in ENGINES]
    cells = [[name, *(_speed(rows, name, column) for column in columns)] for name in rows]
    return unpadded([["network", *titles], *cells], words=1)


def _speed(rows: Mapping[str, Row], name: str, column: str) -> str:
    value, dense = rows[name][column], rows["dense"][column]
    if column.endswith("latency"):
        return f"{value:.2f} ms ({dense / value:.2f}x)"
    return f"{value:.0f} img/s ({value / dense:.2f}x)"


def size_table(rows: Mapping[str, Row]) -> str:
    titles = ["checkpoint to resume from", "float32 weights", "the same, gzip", "the same, xz"]
    dense = rows["dense"]
    cells = [
        [n, *(f"{row[f] / 1e6:.2f} MB ({dense[f] / row[f]:.2f}x smaller)" for f in FILES)]
        for n, row in rows.items()
    ]
    return unpadded([["network", *titles], *cells], words=1)


if __name__ == "__main__":
    sys.exit(run_command(main))
