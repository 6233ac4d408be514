"""Streaming images that do not fit on the GPU, one batch ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Sent = tuple[Tensor, Tensor]  # rows of images, and their indices


def streamed(images: Tensor, wanted: Sequence[Tensor], device: torch.device) -> Iterator[Sent]:
    """Yield the images at each index tensor of ``wanted``, and the indices, on a GPU.

    Rows are gathered into pinned memory and copied on a separate stream, so that neither the host
    nor the previous step waits for them.

    Args:
        images: uint8 ``[rows, H, W, C]``, on the host.
        wanted: int64 indices of each batch, on the host.
        device: a GPU.
    """
    if not wanted:
        return
    sender = _Sender(images, max(map(len, wanted)), device)
    ahead = sender.send(wanted[0])
    for following in [*wanted[1:], None]:
        now = ahead
        if following is not None:
            ahead = sender.send(following)
        yield now.arrived()


class _Parcel:
    """A batch in transfer."""

    def __init__(self, content: Sent, sent: torch.cuda.Event, device: torch.device) -> None:
        self._content, self._sent, self._device = content, sent, device

    def arrived(self) -> Sent:
        """The batch, for work on the current stream, which waits for it; the host does not."""
        here = torch.cuda.current_stream(self._device)
        here.wait_event(self._sent)
        for value in self._content:
            value.record_stream(here)  # its memory is not reused before that work is done
        return self._content


class _Sender:
    """Two slots of pinned memory: one is copied while the other is filled."""

    def __init__(self, images: Tensor, most: int, device: torch.device) -> None:
        self._images, self._device = images, device
        self._stream = torch.cuda.Stream(device)
        self._slots = [
            (_pinned((most, *images.shape[1:]), torch.uint8), _pinned((most,), torch.int64))
            for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]

    def send(self, indices: Tensor) -> _Parcel:
        # the older of the two slots
        self._slots.reverse()
        self._sent.reverse()
        if self._sent[0] is not None:
            self._sent[0].synchronize()  # from two batches ago, so nearly always done
        rows, numbers = (slot[: len(indices)] for slot in self._slots[0])
        torch.index_select(self._images, 0, indices, out=rows)
        numbers.copy_(indices)
        with torch.cuda.stream(self._stream):
            content = (
                rows.to(self._device, non_blocking=True),
                numbers.to(self._device, non_blocking=True),
            )
            sent = torch.cuda.Event()
            sent.record()
        self._sent[0] = sent
        return _Parcel(content, sent, self._device)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
