"""Data: load labelled pictures, split them over diverse clients, and serve augmented batches."""

from .augment import Pictures
from .dataset import Dataset, hold_out
from .datasets import load_dataset
from .diversity import diversify, skew_quantities
from .errors import DataError
from .partition import partition_labels
from .records import save_partition, save_samples

__all__ = [
    "DataError",
    "Dataset",
    "Pictures",
    "diversify",
    "hold_out",
    "load_dataset",
    "partition_labels",
    "save_partition",
    "save_samples",
    "skew_quantities",
]
