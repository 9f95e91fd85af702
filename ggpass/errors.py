"""The errors ggpass raises on purpose; each message names the thing, the reason and the next action."""


class GgpassError(Exception):
    """Base of every error that ggpass raises on purpose."""


class FormatError(GgpassError, ValueError):
    """A format, a code or a stored file is not what it should be."""


class WeightError(GgpassError, ValueError):
    """A weight cannot be lowered: the message holds its name."""


class TargetError(GgpassError, ValueError):
    """A target string names nothing, or a target cannot be used on this machine."""


class TraceError(GgpassError, RuntimeError):
    """A model could not be traced; the message says what broke and what still works."""


class PassError(GgpassError, RuntimeError):
    """A pass left a Program that is no longer legal."""


class InputError(GgpassError, TypeError):
    """An Artifact was called with inputs that it was not built for."""


class KernelsUnavailable(GgpassError, RuntimeError):
    """Generated kernels cannot be had on this machine; the message gives the reason and the next action."""
