"""What can go wrong in a run and is not a bug; the command line prints the message alone."""

from pathlib import Path


class TrainError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class CheckpointError(TrainError):
    """A checkpoint is missing, damaged, or of another kind of run."""


class RunFolderError(TrainError):
    """The run's folder cannot be used as asked."""


class WriteError(TrainError):
    """A file cannot be written; what stood in its place stays."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path} ({error.strerror or error}); the files written before are whole"
        )


class NonFiniteLossError(TrainError):
    """The loss became NaN or infinite."""


class PeerError(TrainError):
    """Another process of this run has ended it, and said why."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended it")


class ImageError(TrainError):
    """A file is not an image that can be read."""


class RunInterruptedError(TrainError):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved its state in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; go on with: fastres train --out {folder} --resume")
        self.folder = folder
