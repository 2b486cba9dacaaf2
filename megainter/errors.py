"""Errors meant for the user: one line saying what, where and what to do, and the exit code it ends with.

The exit codes are documented in docs/failures.md.
"""

STOPPED_EARLY = 75  # stopped on request; the same command goes on where it stopped


class MegainterError(Exception):
    """Base of every error whose text is written for the user. ``exit_code`` is what the command ends with."""

    exit_code = 1


class UsageError(MegainterError):
    """A command line, a configuration or an input that cannot be used as given."""

    exit_code = 2


class TooManyBadInputsError(MegainterError):
    """More inputs were unreadable than the limit allows."""

    exit_code = 3


class DamagedError(MegainterError):
    """A store or a checkpoint that is incomplete or does not match its checksums."""

    exit_code = 4


class NoSpaceError(MegainterError):
    """The disk is full; what was committed before is kept."""

    exit_code = 5


class LockedError(MegainterError):
    """Another process is writing the same output."""

    exit_code = 6


class NumericsError(MegainterError):
    """Training diverged: losses or gradients are no longer finite."""

    exit_code = 7


class HungError(MegainterError):
    """No rank made progress any more; all were ended, and the last checkpoint stands."""

    exit_code = 8


class HardwareError(MegainterError):
    """A step that was done twice gave other numbers the second time."""

    exit_code = 9


class StoppedEarly(MegainterError):
    """Stopped on request (SIGTERM, SIGINT, SIGUSR1, a time limit); the state is saved and the same command resumes."""

    exit_code = STOPPED_EARLY
