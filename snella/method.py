"""What a method file imports: the interface, and helpers of `methods` and `models`."""

from snella.errors import CannotMerge, Unsupported
from snella.methods.base import Batch, LossFn, Method, load_method
from snella.methods.calibration import batch_gradients, first_images
from snella.models.entries import fold_entries, fold_parametrizations, train_entries
from snella.models.families import (
    Slot,
    blocks,
    family,
    fuse_qkv,
    head,
    replace,
    slots,
    split_qkv,
)
from snella.models.names import ROLES
from snella.models.parameters import count_parameters, no_decay, seed_everything, trainable

__all__ = [
    "ROLES",
    "Batch",
    "CannotMerge",
    "LossFn",
    "Method",
    "Slot",
    "Unsupported",
    "batch_gradients",
    "blocks",
    "count_parameters",
    "family",
    "first_images",
    "fold_entries",
    "fold_parametrizations",
    "fuse_qkv",
    "head",
    "load_method",
    "no_decay",
    "replace",
    "seed_everything",
    "slots",
    "split_qkv",
    "train_entries",
    "trainable",
]
