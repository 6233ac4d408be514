"""Images streamed to a GPU, with fake streams that record what they are asked to do."""

import contextlib

import pytest
import torch

from data import Augmentation, TrainLoader, streaming
from tests import toy

HOST = torch.device("cpu")


@pytest.fixture
def notes(monkeypatch):
    """What streams and events were asked to do, in order."""
    notes = []

    class Event:
        number = 0

        def __init__(self):
            Event.number += 1
            self.number = Event.number

        def record(self):
            notes.append(f"sent {self.number}")

        def synchronize(self):
            notes.append(f"host waits for {self.number}")

    class Stream:
        def __init__(self, device):
            pass

        def wait_event(self, event):
            notes.append(f"step waits for {event.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    original = torch.Tensor.to

    def to(self, *arguments, **options):
        """A copy to a GPU has its own memory."""
        sent = options.get("non_blocking", False)
        return self.clone() if sent else original(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(streaming, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    return notes


def test_each_batch_arrives_whole_and_one_ahead(notes):
    images = toy.split(40).images
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    wanted = list(order.split(12))
    found = []
    for number, (rows, indices) in enumerate(streaming.streamed(images, wanted, HOST), 1):
        notes.append(f"step {number}")
        found.append((rows, indices))
    assert len(found) == 4
    for (rows, indices), expected in zip(found, wanted, strict=True):
        assert torch.equal(indices, expected)
        assert torch.equal(rows, images[expected])
    assert notes == [
        *("sent 1", "sent 2", "step waits for 1", "step 1"),
        *("host waits for 1", "sent 3", "step waits for 2", "step 2"),
        *("host waits for 2", "sent 4", "step waits for 3", "step 3"),
        *("step waits for 4", "step 4"),
    ]


def test_no_batch_is_no_work(notes):
    assert list(streaming.streamed(toy.split(4).images, [], HOST)) == []
    assert notes == []


@pytest.mark.parametrize("first_step", [0, 2])
def test_an_epoch_that_travels_is_the_epoch_that_stays(notes, monkeypatch, first_step):
    split = toy.split(50)
    resident = list(TrainLoader(split, 16, Augmentation(1, flip=True), 1).epoch(3, first_step))

    def travelling(self, wanted):
        return streaming.streamed(self.images, wanted, HOST)

    monkeypatch.setattr(type(split), "batches", travelling)
    loader = TrainLoader(split, 16, Augmentation(1, flip=True), 1)
    for one, other in zip(resident, loader.epoch(3, first_step), strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.indices, other.indices)
        assert (one.weight, one.total) == (other.weight, other.total)
