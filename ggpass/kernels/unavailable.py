"""The one error of this package: why there are no kernels here, and what to do about it."""

from ggpass.errors import GgpassError


class KernelsUnavailable(GgpassError, RuntimeError):
    """Generated kernels cannot be had on this machine; the message gives the reason and the next action."""
