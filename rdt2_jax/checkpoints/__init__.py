"""Training state on disk: one directory per checkpoint, and the series of them that a run leaves behind."""

from rdt2_jax.checkpoints.envelope import DamagedCheckpointError, is_checkpoint, read_metadata, stored_items
from rdt2_jax.checkpoints.reading import (
    PartialRestore,
    StoredLeaves,
    host_target,
    restore,
    restore_partial,
    restore_streamed,
    stored_metadata,
)
from rdt2_jax.checkpoints.series import Checkpoints, DamagedCheckpointWarning, Resumed
from rdt2_jax.checkpoints.streaming import StreamedSave, save_streamed
from rdt2_jax.checkpoints.writing import save

__all__ = [
    "Checkpoints",
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "PartialRestore",
    "Resumed",
    "StoredLeaves",
    "StreamedSave",
    "host_target",
    "is_checkpoint",
    "read_metadata",
    "restore",
    "restore_partial",
    "restore_streamed",
    "save",
    "save_streamed",
    "stored_items",
    "stored_metadata",
]
