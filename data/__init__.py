"""Data sets on the training device."""

from data.augment import Augmentation
from data.loader import Batch, Split, TrainLoader, plain_batches
from data.loading import Data, calibration_batches, load_data
from data.sources import DECODED_HERE, SOURCES

__all__ = [
    "DECODED_HERE",
    "SOURCES",
    "Augmentation",
    "Batch",
    "Data",
    "Split",
    "TrainLoader",
    "calibration_batches",
    "load_data",
    "plain_batches",
]
