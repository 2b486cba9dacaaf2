"""Seeds and everything that fuzzing ever found, given to their parsers again; a slice of fuzzing in the slow suite."""

import pickle
from pathlib import Path

import pytest

from megainter.errors import DamagedError, MegainterError
from preprocessing.detector.restricted_pickle import load_restricted
from preprocessing.features.formats.entry import BadEntryError, integer
from tests.fuzz import __main__ as command
from tests.fuzz.judging import forget_peak, judge
from tests.fuzz.targets import TARGETS, Target, forget, in_memory

QUICK = [target for target in TARGETS if not target.slow]


def replayed(target: Target) -> list[str]:
    """What is wrong with what the parser does with each input of its corpus."""
    forget_peak()
    folder = in_memory(target.name)
    try:
        parse = target.open(folder)
        return [f"{fault.kind}: {fault.detail}" for data in target.inputs() if (fault := judge(parse, data)) is not None]
    finally:
        forget(folder)


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_what_was_found_stays_mended(target: Target) -> None:
    assert replayed(target) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target.slow], ids=lambda target: target.name)
def test_what_was_found_stays_mended_where_an_input_takes_long(target: Target) -> None:
    assert replayed(target) == []


@pytest.mark.slow
def test_a_slice_of_fuzzing_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--seconds", str(10 * len(TARGETS)), "--keep", str(tmp_path)])
    told = capsys.readouterr().out
    assert code == 0, told
    assert all(int(line.split()[1].replace(",", "")) > 0 for line in told.splitlines()[1 : 1 + len(TARGETS)]), told


def test_a_time_in_which_nothing_could_be_tried_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--seconds", "20"])
    assert f"less than 2 for each of {len(TARGETS)} target(s)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_parser_that_breaks_its_promise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no finding would mean nothing: a hole in a parser is found within seconds by each way of looking for it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import re\nimport preprocessing.features.formats.tsv as tsv\n"
        "def opened(count, *rest):\n    raise IndexError('a hole')\n"
        "tsv.region_count = opened\n"
    )
    found = command.main(["feature-tables", "--seconds", "20", "--inputs", "3000", "--keep", str(tmp_path / "kept")])
    assert found == 1


def test_what_is_judged_wrong() -> None:
    forget_peak()  # of tests before, beside which 200 MiB are nothing

    def raising(error: Exception) -> str:
        def parse(data: bytes) -> None:
            raise error

        fault = judge(parse, b"x")
        return fault.kind.split(" at ")[0].split(" nowhere")[0] if fault is not None else ""

    assert judge(lambda data: bytearray(200 << 20)[-1], b"x").kind == "memory"  # type: ignore[union-attr]
    assert raising(KeyError("a")) == "KeyError"
    assert raising(MegainterError("a sound line")) == ""
    assert raising(MegainterError("")).startswith("not one printable line")


def test_errors_are_one_bounded_printable_line() -> None:
    long = str(MegainterError("x" * 100_000))
    assert len(long) <= 4000
    assert long.endswith("more characters")
    told = str(MegainterError("a\nb\r\nc\x1b[31m\u202ed\ud800e\x00 日本 é"))
    assert told.isprintable()
    assert "日本 é" in told
    assert "\\x1b[31m" in told
    assert str(MegainterError(long)) == long
    assert str(pickle.loads(pickle.dumps(DamagedError("a\tb")))) == "a\\tb"


def test_a_pickle_whose_keys_would_be_hashed_for_ever_is_refused() -> None:
    """(), then forty times a pair of what there is with itself: hashing the last takes 2^40 steps."""
    pairs = b")" + b"2\x86" * 40
    for use in (b"}" + pairs + b"Ns.", b"}(" + pairs + b"Nu.", b"(" + pairs + b"Nd.", b"\x8f(" + pairs + b"\x90.", b"(" + pairs + b"\x91.",
                b"cbuiltins\nset\n(]" + pairs + b"atR.", b"ccollections\nOrderedDict\n(](" + pairs + b"NtatR."):  # fmt: skip
        with pytest.raises(DamagedError, match="a key that is a container of containers"):
            load_restricted(b"\x80\x04" + use)


def test_a_value_that_holds_itself_twice_over_and_over_is_told_by_its_kind() -> None:
    """Its text would have 2^40 characters."""
    value = load_restricted(b"\x80\x04)" + b"2\x86" * 40 + b".")
    with pytest.raises(BadEntryError, match="image_w is a tuple, not a number"):
        integer(value, "image_w")
    with pytest.raises(BadEntryError, match="many digits"):
        integer(10**5000, "image_w")
