"""Errors meant for the user: one line saying what, where and what to do, and the exit code it ends with.

The exit codes are documented in docs/failures.md.
"""

import unicodedata

LONGEST_MESSAGE = 4000  # characters, whatever a file holds that it quotes
STOPPED_EARLY = 75  # stopped on request; the same command goes on where it stopped


class MegainterError(Exception):
    """Base of every error whose text is written for the user. ``exit_code`` is what the command ends with.

    The text is one bounded line (``one_line``) whatever names, ids and libraries' words are quoted in it.
    """

    exit_code = 1

    def __init__(self, text: str = "") -> None:
        super().__init__(one_line(text))


class UsageError(MegainterError):
    """A command line, a configuration or an input that cannot be used as given."""

    exit_code = 2


class UnknownSettingError(UsageError):
    """A setting that there is not, nor one of nearly its name; ``typed`` is its name where it stands on the command line."""

    def __init__(self, text: str, typed: str | None) -> None:
        super().__init__(text)
        self.typed = typed


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


def one_line(text: str) -> str:
    """``text`` as one line of at most ``LONGEST_MESSAGE`` characters: line breaks are blanks, and what a terminal would act on (or cannot
    show: control characters, changes of direction, lone surrogates) stands there as Python writes it.
    """
    text = str(text)
    if len(text) > LONGEST_MESSAGE:
        more = f" and {len(text) - LONGEST_MESSAGE + 40:,} more characters"
        text = text[: LONGEST_MESSAGE - 40] + more
    return text if text.isprintable() else "".join(map(_shown, text))[:LONGEST_MESSAGE]


def _shown(character: str) -> str:
    if character in "\r\n":
        return " "
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()
