"""Networks on the Hugging Face Hub; the only module that needs ``huggingface_hub``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from models.loading import build_network, network_of, stored_network
from utils.errors import InputError
from utils.storage.safetensors import safetensors_bytes

WEIGHTS = "model.safetensors"
LICENSE, LIBRARY = "mit", "pytorch"
TAGS = ["adversarial-robustness", "sparsity", "image-classification"]


class HubNetwork(nn.Module, PyTorchModelHubMixin, library_name=LIBRARY, license=LICENSE, tags=TAGS):
    """One of our networks with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    ``HubNetwork.from_pretrained(folder_or_repository)`` maps images ``[N, C, H, W]`` with pixels in
    [0, 1] to logits ``[N, classes]``, in eval mode. Its folder holds ``config.json`` and
    ``model.safetensors``, which ``models.load_model`` reads too.

    Args:
        network: description for ``models.loading.build_network``, the content of ``config.json``.
    """

    about: Mapping[str, Any] = {}

    def __init__(self, **network: Any) -> None:
        super().__init__()
        self.spec = network
        self.network = build_network(network, torch.device("cpu"))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @classmethod
    def read(cls, path: str | Path, about: Mapping[str, Any] | None = None) -> HubNetwork:
        """Load one of our checkpoints or safetensors files; raises ``InputError``. ``about`` is the
        metadata to save with it; by default, that of a ``model.safetensors`` is kept."""
        content, spec = stored_network(path)
        network = network_of(content, path, spec, torch.device("cpu"))
        model = cls(**spec)
        model.network = network
        told = {name: content[name] for name in content if name not in ("state_dict", "network")}
        model.about = (told if str(path).endswith(WEIGHTS) else {}) if about is None else about
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        content = safetensors_bytes(self.network.state_dict(), self.spec, self.about)
        (Path(save_directory) / WEIGHTS).write_bytes(content)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        **given: Any,  # how to download, and config.json's content, which the weights' file has too
    ) -> HubNetwork:
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        download = {name: given.pop(name) for name in names if name in given}
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            path = Path(hf_hub_download(model_id, WEIGHTS, **download))
        model = cls.read(path)
        if changed := [name for name in given if given[name] != model.spec.get(name)]:
            raise InputError(
                f"{path} holds another network: {', '.join(changed)} cannot be changed"
            )
        return model.to(map_location)
