"""The errors moekit raises on purpose: one sentence each, and a stack trace is never the message."""


class MoekitError(Exception):
    """Base of every error moekit raises about its input."""


class DeclarationError(MoekitError):
    """A declaration says something the language cannot mean."""


class ShapeError(MoekitError, ValueError):
    """A tensor's shape does not fit the declaration."""


class DtypeError(MoekitError, TypeError):
    """A tensor's dtype does not fit the declaration."""


class ArgumentError(MoekitError, ValueError):
    """A value that a call cannot take."""


class NonFiniteError(MoekitError, ArithmeticError):
    """A computation gave NaN or an infinity where numbers are needed."""


class FileError(MoekitError, OSError):
    """A file that cannot be read or written."""


class DeviceError(MoekitError, ValueError):
    """A tensor lives on a device where the call cannot be served."""


class AliasError(MoekitError, ValueError):
    """An output overlaps memory that it must not overlap."""


class ScheduleError(MoekitError, ValueError):
    """A schedule cannot be used for these sizes."""


class UnavailableError(MoekitError, RuntimeError):
    """A named implementation cannot serve this call here."""


class VerifyError(MoekitError):
    """A TileProgram breaks a rule of the IR."""


class RankError(MoekitError, RuntimeError):
    """A rank of a mesh did not take part in a call."""


class MissingExtraError(MoekitError, ModuleNotFoundError):
    """A face is imported without its framework."""
