"""Data: load a set of labelled pictures, split it over clients, and serve augmented batches."""

from .augment import Pictures
from .dataset import Dataset, hold_out
from .datasets import load_dataset
from .errors import DataError
from .partition import partition_labels, save_partition

__all__ = [
    "DataError",
    "Dataset",
    "Pictures",
    "hold_out",
    "load_dataset",
    "partition_labels",
    "save_partition",
]
