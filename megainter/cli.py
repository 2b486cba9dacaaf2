"""The command line: one verb table. The verbs stand in `megainter.verbs`; help answers at once, since only a verb imports what it runs."""

import difflib
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from cyclopts import App, Argument, CoercionError, CycloptsError, MissingArgumentError, UnusedCliTokensError
from cyclopts.help import DefaultFormatter

from megainter.errors import STOPPED_EARLY, MegainterError, NoSpaceError, UnknownSettingError, UsageError, one_line
from megainter.files import FULL, is_full
from megainter.process import adopt_rank, end_with_launcher, interrupt_on_sigterm, launched, record_exit
from megainter.verbs.convert import convert_app
from megainter.verbs.demo import demo
from megainter.verbs.detector import detector_app
from megainter.verbs.evaluate import evaluate_app
from megainter.verbs.extract import extract
from megainter.verbs.features import features_app
from megainter.verbs.finetune import finetune_app
from megainter.verbs.index import index
from megainter.verbs.init import init
from megainter.verbs.launch import launch
from megainter.verbs.plan import plan
from megainter.verbs.preflight import preflight
from megainter.verbs.prepare import prepare_app
from megainter.verbs.pretrain import pretrain
from megainter.verbs.replay import replay
from megainter.verbs.search import search
from megainter.verbs.serve import serve
from megainter.verbs.track import track
from megainter.verbs.view import view_app

FIRST_SPEAKS = 10  # seconds in which the first rank's end takes the others with it
# What the user can mend: a full or read-only disk, a path of the wrong kind or without permission.
CANNOT_WRITE = (
    *FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY,
)  # fmt: skip


class Flowing(DefaultFormatter):
    """Help whose lines break where the terminal's do: without the breaks that docstrings have within a paragraph."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        for entry in panel.entries:
            _flow(entry.description)
        super().__call__(console, options, panel)

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        _flow(description)
        super().render_description(console, options, description)


def _flow(text: Any) -> None:
    """Join a paragraph's lines, in place; what is no plain text stays."""
    written: Any = getattr(text, "primary_renderable", None)
    if getattr(written, "plain", None):
        written.plain = "\n\n".join(" ".join(part.split()) for part in written.plain.split("\n\n"))


app = App(
    name="megainter",
    help="Pretrain InterBERT, a vision-and-language BERT, on your own images and captions.",
    help_epilogue="Exit codes: 0 done, 2 usage, 3 bad input, 4 damage, 5 disk full, 6 in use, 7 diverged, 8 hung, 9 faulty, 75 stopped.",
    help_format="plaintext",
    help_formatter=Flowing(),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
app.command(demo)
app.command(prepare_app)
app.command(extract)
app.command(detector_app)
app.command(features_app)
app.command(init)
app.command(pretrain, help_flags=[])
app.command(finetune_app)
app.command(launch)
app.command(plan)
app.command(preflight)
app.command(replay)
app.command(evaluate_app)
app.command(convert_app)
app.command(index)
app.command(search)
app.command(serve)
app.command(track)
app.command(view_app)


@app.command(name="--install-completion")
def install_completion(*, shell: Literal["bash", "zsh", "fish", "powershell"] | None = None) -> None:
    """Install completion of verbs and options for your shell, and have its startup file load it.

    Parameters
    ----------
    shell
        The shell, where it cannot be told by itself.
    """
    from cyclopts.completion.detect import ShellDetectionError

    try:
        path = app.install_completion(shell=shell, add_to_startup=True)
    except ShellDetectionError:
        raise UsageError("which shell this is cannot be told; give --shell bash, zsh, fish or powershell") from None
    print(f"{path}: installed; open a new shell, or load the file in this one")


def main(tokens: Sequence[str] | None = None) -> None:
    """Run one verb; a user's mistake ends in one line and its exit code, without a traceback."""
    adopt_rank()
    if not launched():  # a rank that is ended since another failed has nothing to say of its own
        interrupt_on_sigterm()
    end_with_launcher()
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        record_exit(0)
    except CycloptsError as error:
        _end(_mistake(error, sys.argv[1:] if tokens is None else tokens), UsageError.exit_code)
    except UnknownSettingError as error:
        _end(f"{error}{_near_option(error.typed, sys.argv[1:] if tokens is None else tokens)}", error.exit_code, told=True)
    except MegainterError as error:
        _end(str(error), error.exit_code, told=isinstance(error, UsageError))
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on where it stopped", STOPPED_EARLY)
    except BrokenPipeError:
        _end("", 1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        _end(f"{error.filename or 'output'}: {error.strerror}", (NoSpaceError if is_full(error) else UsageError).exit_code)


def _mistake(error: CycloptsError, tokens: Sequence[str]) -> str:
    """What is wrong with the command line, and the page of help that says what is right."""
    words = " ".join(error.command_chain or ())
    text = " ".join(str(error).split()).rstrip(" .,")
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        given = {token.partition("=")[0] for token in tokens}
        guess = text[text.index("Did you mean") :] if "Did you mean" in text else _near_command(words, tokens)  # for one that was mistyped
        named = given & set(error.argument.names)
        text = f"{error.argument.name} needs a value" if named else f"{words} needs {', '.join(_missing(error.argument, words, given))}"
        text = f"{text}. {guess}" if guess else text
    elif isinstance(error, CoercionError) and error.token is not None and "Did you mean" not in text:
        text += f". {near}" if (near := _near_command(words, [*words.split(), error.token.value])) else ""
    elif isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        unused = ", ".join(f"{token!r:.80}" for token in error.unused_tokens[:3])
        text = f"{words} has no use for {unused}; in a shell, what has spaces in it stands in quotes"
    return f"{text} (see {f'megainter {words}'.strip()} --help)"


def _near_command(words: str, tokens: Sequence[str]) -> str:
    """The command of a verb that the word after it may stand for: a verb's commands stand where its own first word does."""
    after = tokens[len(words.split()) :][:1]
    parts = [name for name in _verb(words) if not name.startswith("-")]
    near = difflib.get_close_matches(after[0], parts, n=1) if after else []
    return f'Did you mean "{words} {near[0]}"?' if near else ""


def _near_option(typed: str | None, tokens: Sequence[str]) -> str:
    """The end of a message about a setting that there is not: the option that may be meant, and the page that has all settings."""
    words = [*app.parse_commands(tokens)[0]]
    if words == ["launch"] and "--" in tokens:
        words = [*app.parse_commands([*tokens][[*tokens].index("--") + 1 :])[0]]
    verb = " ".join(words)
    near = _nearest(typed, verb)
    if near is None and words[:1] in (["pretrain"], ["finetune"]) and (placed := _nearest(typed, "launch")):
        near = f"megainter launch {placed}"
    return (f"; did you mean {near}?" if near else "") + f" (see megainter {verb} --help)"


def _nearest(typed: str | None, verb: str) -> str | None:
    """The verb's own option of nearly the name of a setting that was typed."""
    own = [name for argument in _verb(verb).assemble_argument_collection() for name in argument.names if name.startswith("--")]
    return next(iter(difflib.get_close_matches(f"--{(typed or '').replace('_', '-')}", own, n=1)), None)


def _verb(words: str) -> App:
    verb = app
    for word in words.split():
        verb = verb[word]
    return verb


def _missing(first: Argument, words: str, given: set[str]) -> list[str]:
    """What the verb requires and was not given: options by their names, and from ``first`` on those that stand without one."""
    arguments = _verb(words).assemble_argument_collection()
    required = [each for each in arguments if each.required and each.parameter.name and not given & set(each.names)]
    places = [each.name for each in required if not each.name.startswith("-")]
    known = places[: places.index(first.name)] if first.name in places else places
    return [each.name for each in required if each.name not in known]


def _end(text: str, code: int, told: bool = True) -> None:
    """Print one line and leave at once, without waiting for other ranks.

    Where all ranks say the same (``told``), the first one says it: the others wait until they are ended since it left, and only one that
    is not speaks for itself.
    """
    record_exit(code)
    rank = int(os.environ.get("RANK", "0"))
    text = one_line(text)
    if text and told and rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_SPEAKS)
    if text:
        print(f"megainter: {text}" if rank == 0 else f"megainter: rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
