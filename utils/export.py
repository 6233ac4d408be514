"""Export of trained networks to files that other programs read (ONNX, safetensors,
``torch.export``, a plain state dict), and to small checkpoints for a release.

Every exported network maps images ``[N, C, H, W]``, float32 pixels in [0, 1], any N, to logits
``[N, classes]``: normalization is inside. Narrow networks stay narrow, except in the plain state
dict, which is full-size. A file is kept only if it, read back, gives the network's logits.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import load_model
from models.loading import build_network, full_size, full_size_state, network_of, stored_network
from sparse_core import prunable
from utils.errors import InputError, RunError, one_line
from utils.seeding import seeded, stream
from utils.settings.common import CommonSettings, settings_from
from utils.settings.stored import SETTINGS_OF
from utils.storage.files import saved_bytes, write_atomically
from utils.storage.packing import compact_network
from utils.storage.safetensors import SUFFIX, safetensors_bytes

TOLERANCE = 1e-5  # largest difference of a logit, as a fraction of the largest logit
_ROUNDED = 1e-2  # the same for weights in float16
_BATCHES = (1, 5)  # batch sizes on which every file is checked
_OPSET = 18  # of ONNX: what every torch from 2.11 on writes without converting
_CHECKPOINT_SUFFIXES = (".pth.tar", ".tar", ".pth", ".pt", SUFFIX)
# kept of a checkpoint: the network's scores, and what an evaluation needs of its run
_KEPT = ("script", "settings", "digests", "epoch", "val_ra", "val_sa", "averaged")
# metadata in a checkpoint, or in safetensors made of one
_TOLD = ("method", "dataset", "seed", "script", "epoch", "val_ra", "val_sa")
_CPU = torch.device("cpu")
_BATCH = ({0: torch.export.Dim("batch")},)  # the dynamic dimension of the images

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode on the CPU, its description for ``build_network``, and
    everything in the file that it was read from."""

    model: nn.Module
    spec: Mapping[str, Any]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path, **given: Any) -> Trained:
        """Read a checkpoint or another file that ``models.loading.stored_network`` takes; raises
        ``InputError``."""
        content, spec = stored_network(path, **given)
        return cls(network_of(content, path, spec, _CPU).eval(), spec, content)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @property
    def density(self) -> float:
        """Nonzero prunable weights as a fraction of the full-size network's prunable weights."""
        live = sum(int(weight.count_nonzero()) for weight in prunable(self.model).values())
        return live / sum(weight.numel() for weight in prunable(self.full_size()).values())

    def full_size(self) -> nn.Module:
        """A newly initialized network without removed channels."""
        return build_network(full_size(self.spec), _CPU)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata beyond its description: density, and what a checkpoint of ours says of its
        training (method, data set, seed, epoch, accuracies)."""
        known = {name: self.content[name] for name in _TOLD if name in self.content}
        settings = _settings_in(self.content)
        if settings is not None:
            known |= {"method": settings.method, "dataset": settings.dataset, "seed": settings.seed}
        with contextlib.suppress(ValueError):  # weights computed from others have no density
            known["density"] = self.density
        return known

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.spec.get("image_shape") or [self.spec["image_size"]] * 2
        return height, width

    def images(self, n: int) -> Tensor:
        """Random images ``[n, C, H, W]`` in [0, 1] of the network's size, always the same ones."""
        with seeded(stream(1, "export", n)):
            return torch.rand(n, len(self.spec["mean"]), *self.image_shape)


def _settings_in(content: Mapping[str, Any]) -> CommonSettings | None:
    """The settings of the run that a checkpoint is of; None if it has none that this version
    reads."""
    kind = SETTINGS_OF.get(str(content.get("script")))
    if kind is None:
        return None
    try:
        return settings_from(kind, content["settings"])
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Format:
    """A file format: its suffix, how a network becomes its content, how the file becomes a
    callable, and the tolerance of that round trip."""

    suffix: str
    content: Callable[[Trained], bytes]
    network: Callable[[Path, Trained], Network]
    tolerance: float = TOLERANCE


def export(
    checkpoint: str | Path, kind: str, out: str | Path | None = None, **given: Any
) -> tuple[Path, float]:
    """Export the network of a checkpoint to another file, atomically.

    Args:
        checkpoint: a file that ``Trained.read`` reads, with ``given``.
        kind: one of ``FORMATS``.
        out: the file to write; by default beside the checkpoint with the format's suffix.

    Returns:
        Its path, and the largest difference of its logits from the network's as a fraction of the
        largest logit.

    Raises:
        InputError: a file that cannot be read or written.
        RunError: the file's logits differ from the network's by too much; it was not kept.
    """
    form = FORMATS[kind]
    path = default_path(Path(checkpoint), kind) if out is None else Path(out)
    _refuse_path(path, Path(checkpoint), kind)
    trained = Trained.read(checkpoint, **given)
    temporary = path.with_name(f".{os.getpid()}-{path.stem}{form.suffix}")
    try:
        write_atomically(temporary, form.content(trained))
        difference = largest_difference(form.network(temporary, trained), trained)
        if not difference <= form.tolerance:
            raise RunError(
                f"{path} was not kept: its logits differ by {difference:.1e} of their scale, more"
                f" than {form.tolerance:g}"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or one_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path, difference


def default_path(checkpoint: Path, kind: str) -> Path:
    """Beside the checkpoint, with the suffix of the format."""
    suffix = next(filter(checkpoint.name.endswith, _CHECKPOINT_SUFFIXES), "")
    stem = checkpoint.name.removesuffix(suffix) or checkpoint.name
    return checkpoint.with_name(stem + FORMATS[kind].suffix)


def _refuse_path(path: Path, checkpoint: Path, kind: str) -> None:
    if path.resolve() == checkpoint.resolve():
        raise InputError(f"{path} is the checkpoint itself; --out FILE writes elsewhere")
    if path.is_dir():
        raise InputError(f"{path} is a folder; --out names a file")
    if not path.parent.is_dir():
        raise InputError(f"no such folder: {path.parent}")
    own = FORMATS[kind].suffix
    # Files that torch.load reads (checkpoints, state dicts) have one of several suffixes.
    loaded = {".tar", ".pth", ".pt"}
    known = loaded | {form.suffix for form in FORMATS.values()}
    if path.suffix in known - (loaded if own in loaded else {own}):
        raise InputError(
            f"{path}: {path.suffix} is the suffix of another format; that of --format {kind} is"
            f" {own}"
        )


@torch.no_grad()
def largest_difference(network: Network, trained: Trained) -> float:
    """Largest difference between the logits of ``network`` and ``trained`` on random images, as a
    fraction of the largest logit; NaN stays NaN."""
    differences = []
    for n in _BATCHES:
        images = trained.images(n)
        expected = trained.model(images)
        differences.append(
            (network(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        )
    return torch.stack(differences).max().item()


# ---- the formats


def onnx_bytes(model: nn.Module, images: Tensor) -> bytes:
    """An ONNX model with input ``images``, output ``logits`` and a dynamic batch size, of a network
    in eval mode and an example batch ``[N, C, H, W]``, N at least 2."""
    options: dict[str, Any] = {"opset_version": _OPSET, "dynamo": True, "verbose": False}
    options |= {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():  # which libraries give about each other
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (images,), dynamic_shapes=_BATCH, **options)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnx_session(content: bytes | str) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch, for a model's bytes or a
    file's path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run_onnx(path: Path, trained: Trained) -> Network:
    session = onnx_session(str(path))
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _program_bytes(trained: Trained) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(trained.model, (trained.images(2),), dynamic_shapes=_BATCH)
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _run_program(path: Path, trained: Trained) -> Network:
    return torch.export.load(str(path)).module()


def _state_bytes(trained: Trained) -> bytes:
    """A flat state dict of the full-size network, as the loaders of the Adversarial Pruning
    Benchmark and of RobustBench expect it."""
    plain = full_size_state(trained.spec, trained.state)
    return saved_bytes({name: value.contiguous() for name, value in plain.items()})


def _run_state(path: Path, trained: Trained) -> Network:
    model = trained.full_size()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def packed_bytes(trained: Trained) -> bytes:
    """A checkpoint that holds the network alone: live weights in float16, masks as bits."""
    kept = {name: trained.content[name] for name in _KEPT if name in trained.content}
    content = {**kept, "network": dict(trained.spec), "state_dict": trained.state}
    try:
        names = list(prunable(trained.model))
    except ValueError as error:
        raise InputError(f"{error}; --format state_dict stores such a network") from error
    return saved_bytes(compact_network(content, names))


FORMATS = {
    "onnx": Format(
        ".onnx", lambda trained: onnx_bytes(trained.model, trained.images(2)), _run_onnx
    ),
    "safetensors": Format(
        SUFFIX,
        lambda trained: safetensors_bytes(trained.state, trained.spec, trained.about),
        lambda path, trained: load_model(path),
    ),
    "torch_export": Format(".pt2", _program_bytes, _run_program),
    "state_dict": Format(".pth", _state_bytes, _run_state),
    "packed": Format(".pt", packed_bytes, lambda path, trained: load_model(path), _ROUNDED),
}
