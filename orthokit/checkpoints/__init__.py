"""Model files of any size: lazy readers that check before they trust, and a writer that is whole or not there."""

from orthokit.checkpoints.reading import Checkpoint, open_checkpoint
from orthokit.checkpoints.writing import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "open_checkpoint"]
