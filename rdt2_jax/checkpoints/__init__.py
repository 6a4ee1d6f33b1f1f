"""Training state on disk: one directory per checkpoint, and the series of them that a run leaves behind."""

from rdt2_jax.checkpoints.directory import (
    DamagedCheckpointError,
    PartialRestore,
    read_metadata,
    restore,
    restore_partial,
    save,
    stored_items,
    stored_metadata,
)
from rdt2_jax.checkpoints.series import Checkpoints, DamagedCheckpointWarning, Resumed

__all__ = [
    "Checkpoints",
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "PartialRestore",
    "Resumed",
    "read_metadata",
    "restore",
    "restore_partial",
    "save",
    "stored_items",
    "stored_metadata",
]
