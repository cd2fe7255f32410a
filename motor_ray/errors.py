"""What can go wrong, each also the builtin a caller would expect.

A message says where, what was got, what was expected and what to do about it.
"""

LOST_CODE = "MOTOR_RAY_LOST_CODE"
"""Environment variable with the exit code, in place of 1, of a verb that ended although something could not be read."""


class MotorRayError(Exception):
    """The root: the command line turns any of these into one sentence and exit code 2; or 1, if the same command may
    succeed another time (UnfinishedError, OutageError).
    """


class ConfigError(MotorRayError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class StorageError(MotorRayError, OSError):
    """A file, folder or bucket cannot be reached, read or written."""


class OutageError(StorageError):
    """Storage did not answer, however often it was asked: it says nothing about the file, so try again later."""


class ManifestError(MotorRayError, ValueError):
    """The table of tomograms is empty, malformed or contradicts itself."""


class LabelsError(MotorRayError, ValueError):
    """The labels are malformed or contradict the tomograms they describe."""


class TomogramError(MotorRayError, ValueError):
    """A tomogram's header cannot be read or describes something we cannot use."""


class SliceMissingError(MotorRayError, FileNotFoundError):
    """A slice that the manifest promises is not there."""


class SliceCorruptError(MotorRayError, ValueError):
    """A slice is there, but its pixels cannot be decoded."""


class CheckpointError(MotorRayError, ValueError):
    """A checkpoint directory is incomplete, of another format version, or not ours."""


class MetricError(MotorRayError, ValueError):
    """Truth and detections cannot be compared."""


class ExportError(MotorRayError, ValueError):
    """Motors cannot be written in the format, or to the place, that was asked for."""


class RunError(MotorRayError, RuntimeError):
    """A run cannot start."""


class BusyError(MotorRayError, RuntimeError):
    """There is no room for another request now; there may be in a moment."""


class UnfinishedError(MotorRayError, RuntimeError):
    """A run started and did work, but failed, or its counts do not add up; the command line's exit code is 1."""
