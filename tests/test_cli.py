"""The command line as a user meets it: quick help, and for every mistake one line and the documented exit code."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from megainter.cli import FIRST_SPEAKS, _mistake, app
from megainter.errors import UsageError
from megainter.verbs.pretrain import settings_of_pretrain
from tests.places import ROOT
from tests.synthetic import environment, settings, train, write_data


def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``megainter`` in a process of its own."""
    command = [sys.executable, "-m", "megainter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("launch --processes 2 -- pretrian --config base", "'pretrian' is nothing to launch; did you mean pretrain?"),
        ("launch -- finetune retreival --config retrieval", "finetune 'retreival' is not a task; did you mean retrieval?"),
        ("view modle --store s --output p.html", 'view needs --images, --pairs. Did you mean "view model"? (see megainter view --help)'),
        ("view batch --output p.html", "give --run RUN, or --config RECIPE and settings as `megainter pretrain` takes them"),
        ("view batch --run . --config base --output p.html", "'--config' and --run: a run has its own settings; give one of both"),
        ("view runs --output p.html", "give the folder of at least one run"),
        ("launch -- finetune", "finetune needs a task: retrieval, vcr, classification"),
        ("launch -- megainter pretrain", "leave out 'megainter' after --"),
        ("launch -- extract --images x", "'extract' is nothing to launch: megainter launch [options] -- pretrain"),
        ("launch --hostfle hosts -- pretrain", "launch has no option '--hostfle'; did you mean --hostfile? (see megainter launch --help)"),
        ("launch", "say what to launch: megainter launch [options] -- pretrain"),
        ("launch -- pretrain --confg base", "unknown setting confg; did you mean config?"),
        ("preflight -- pretrian --config base", "preflight takes the settings of pretrain, and 'pretrian' is none; did you mean pretrain?"),
        ("plan --config base --gpus 8 --gpu h100 -- pretrian", "'pretrian' is none; did you mean pretrain? It may be left out (see"),
        ("prepare negativs pairs.parquet --output n.parquet", 'Unknown command "negativs". Did you mean "negatives"?'),
        ("prepare jsnl a.jsonl --output p.parquet", 'Did you mean "jsonl"?'),
        ("extract --images x --output y", "extract needs --weights (see megainter extract --help)"),
        ("extract --images x --output y --weights", "--weights needs a value (see megainter extract --help)"),
        ("detector check --weights photos", "detector check needs --image (see megainter detector check --help)"),
        ("prepare boxes", "prepare boxes needs SRC, --output (see megainter prepare boxes --help)"),
    ],
)  # fmt: skip
def test_a_word_that_is_wrong_is_told_with_the_nearest_right_one(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((CycloptsError, UsageError)) as error:
        app(words.split(), exit_on_error=False, print_error=False, result_action="return_value")
    line = _mistake(error.value, words.split()) if isinstance(error.value, CycloptsError) else str(error.value)
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("plan --config small --gpus 8 --gpu h100 --gpus-per-node 8", "did you mean --per-node? (see megainter plan --help)"),
        ("plan --config small --gpus 8 --gpu h100 --foo.bar 8", "unknown setting foo.bar (see megainter plan --help)"),
        ("preflight --config small --proceses 3", "proceses; did you mean --processes? (see megainter preflight --help)"),
        ("pretrain --config small --processes 2", "did you mean megainter launch --processes? (see megainter pretrain --help)"),
        ("launch -- pretrain --config small --zzz 2", "unknown setting zzz (see megainter pretrain --help)"),
        ("pretrain --config small --lr 1", "unknown setting lr; did you mean optimizer.learning_rate?\n"),
        ("pretrain --config small --training.batch_size 1", "did you mean training.global_batch?\n"),
        ("pretrain --config small --data.micro-batch 1", "unknown setting data.micro_batch; did you mean training.micro_batch?\n"),
    ],
)
def test_an_unknown_setting_is_told_what_may_be_meant_and_nothing_far(words: str, told: str) -> None:
    done = run(*words.split(), "--data.pairs", "p", "--data.store", "s")
    assert done.returncode == 2
    assert told in done.stderr


def test_a_file_that_is_not_there_is_told_with_what_makes_it(tmp_path: Path) -> None:
    done = run("pretrain", "--config", "small", "--data.pairs", tmp_path / "p.parquet", "--data.store", tmp_path / "s.store")
    assert_one_line(done, 2, "p.parquet does not exist; `megainter prepare` makes one")
    (tmp_path / "pp.parquet").touch()
    done = run("pretrain", "--config", "small", "--data.pairs", tmp_path / "p.parquet", "--data.store", tmp_path / "s.store")
    assert_one_line(done, 2, "pp.parquet?")


def test_the_word_pretrain_may_stand_before_its_settings() -> None:
    assert settings_of_pretrain(["pretrain", "--config", "base"], "plan") == ["--config", "base"]
    assert settings_of_pretrain(["--config", "base"], "plan") == ["--config", "base"]
    assert settings_of_pretrain([], "plan") == []


def test_help_answers_at_once() -> None:
    best = min(_seconds("--help") for _ in range(5))
    assert best < 0.5, f"megainter --help took {best:.2f} s at best"


def _seconds(*arguments: str) -> float:
    start = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - start


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, megainter.cli; sys.exit(' '.join({'torch', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "verb",
    ["demo", "prepare", "extract", "pretrain", "launch", "plan", "preflight", "evaluate", "convert", "index", "search", "serve", "view"],
)
def test_every_verb_explains_itself(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize("words", [["--config", "base", "--help"], ["--training.steps", "3", "-h"]], ids=" ".join)
def test_help_is_taken_anywhere_among_the_settings(words: list[str]) -> None:
    done = run("pretrain", *words)
    assert done.returncode == 0
    assert "--training.global_batch INT  (default 512)\n      Samples of one optimiser step over all ranks." in done.stdout


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit code, one line on standard error, no traceback, and the words that help."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("megainter:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_unknown_verb_and_option() -> None:
    assert_one_line(run("pretrian"), 2, "pretrian")
    assert_one_line(run("extract", "--imagse", "x"), 2, "--imagse")
    assert_one_line(run("prepare", "tsv", "x", "--output", "y"), 2, "tsv")
    words = ["--images", "my", "photos", "--output", "store", "--weights", "photos"]  # a folder "my photos" without quotes
    assert_one_line(run("extract", *words), 2, "extract has no use for 'photos'; in a shell, what has spaces in it stands in quotes")


def test_missing_files(tmp_path: Path) -> None:
    assert_one_line(run("pretrain", "--config", tmp_path / "no.toml"), 2, "no.toml does not exist")
    assert_one_line(run("prepare", "jsonl", tmp_path / "no.jsonl", "--output", tmp_path / "p.parquet"), 2, "no.jsonl")
    (tmp_path / "captions.csv").touch()
    mistyped = run("prepare", "csv", tmp_path / "caption.csv", "--output", tmp_path / "p.parquet")
    assert_one_line(mistyped, 2, f"is not a file; did you mean {tmp_path / 'captions.csv'}?")
    assert_one_line(run("convert", "zero", tmp_path / "no-run", tmp_path / "hf"), 2, "no-run does not exist")
    assert not (tmp_path / "p.parquet").exists()
    assert not (tmp_path / "hf").exists()


def test_empty_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    weights = ROOT / "preprocessing" / "assets" / "demo_detector.safetensors"
    assert_one_line(run("extract", "--images", tmp_path / "images", "--output", tmp_path / "store", "--weights", weights), 2, "images")


def test_training_mistakes(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=12)
    run_folder = tmp_path / "run"
    assert_one_line(train(settings(tmp_path / "no.parquet", store, run_folder)), 2, "no.parquet")
    assert not run_folder.exists(), "a start that failed left something"
    assert_one_line(train(settings(pairs, tmp_path / "no.store", run_folder)), 2, "no.store")
    assert_one_line(train(settings(pairs, store, run_folder, data__split="nope")), 2, "nope")
    assert_one_line(train(settings(pairs, store, run_folder, model__region_feature_size=99)), 2, "region_feature_size is 99")
    assert_one_line(train(settings(pairs, store, run_folder, training__global_batch=18)), 2, "global_batch 18 is not a multiple")


def test_captions_without_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pairs, _ = write_data(tmp_path / "a", images=16)
    _, store = write_data(tmp_path / "b", images=8)
    assert_one_line(train(settings(pairs, store, tmp_path / "run")), 3, "image-008", "--data.max_bad")


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=12)
    assert train(settings(pairs, store, tmp_path / "run", training__steps=2)).returncode == 0
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert_one_line(train(settings(pairs, store, tmp_path / "run", training__steps=2, training__seed=8)), 2, "training.seed: 7 -> 8")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_a_deepspeed_json_cannot_say_otherwise(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=12)
    for content, word in [
        ('{"optimizer": {"type": "Adam"}}', "optimizer"),
        ('{"zero_optimisation": {"stage": 2}}', "did you mean 'zero_optimization'"),
        ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3"),
        ("{", "not valid JSON"),
    ]:
        (tmp_path / "ds.json").write_text(content)
        assert_one_line(train(settings(pairs, store, tmp_path / "run", engine__deepspeed=tmp_path / "ds.json")), 2, word)


def test_a_mistake_is_told_once_by_many_ranks(tmp_path: Path) -> None:
    _, store = write_data(tmp_path, images=12)
    done = train(settings(tmp_path / "no.parquet", store, tmp_path / "run"), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("no.parquet") == 1, done.stderr


def test_a_mistake_of_one_rank_alone_is_told_by_it(tmp_path: Path) -> None:
    """Data may be missing on one host; and a rank that is quicker than the first leaves it the time to speak."""
    command = [sys.executable, "-m", "megainter", "evaluate", "retrieval", str(tmp_path), "--pairs", "p", "--store", "s", "--output", "o"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment() | {"RANK": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("megainter: rank 1: "), done.stderr
    assert time.perf_counter() - start > FIRST_SPEAKS


def test_two_runs_in_one_folder_at_once(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=12)
    arguments = settings(pairs, store, tmp_path / "run", training__steps=100000)
    first = subprocess.Popen(
        [sys.executable, "-m", "megainter.pretrain", *arguments], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert_one_line(train(arguments), 6, "in use", str(first.pid))
    finally:
        os.kill(first.pid, 9)
        first.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("extract", "extract needs --images, --output, --weights (see megainter extract --help)"),
        ("extract --images photos", "extract needs --output, --weights (see megainter extract --help)"),
        ("extract --images", "--images needs a value (see megainter extract --help)"),
        ("evaluate retrieval model --store s", "evaluate retrieval needs --pairs, --output (see megainter evaluate retrieval --help)"),
        ("features import", "features import needs SRC, DST (see megainter features import --help)"),
        ("features import a.tsv", "features import needs DST (see megainter features import --help)"),
        ("extract --imags p", "--weights. Did you mean --images instead of --imags? (see megainter extract --help)"),
        ("extrct", 'Did you mean "extract"?'),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_the_page_that_explains_it(words: str, said: str) -> None:
    assert_one_line(run(*words.split()), 2, said)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here to complete anything")
def test_a_shell_completes_verbs_and_options_once_that_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megainter", "--install-completion", "--shell", "bash"]
    own = {**environment(), "HOME": str(tmp_path)}
    own.pop("XDG_DATA_HOME", None)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    file = Path(done.stdout.partition(":")[0])
    assert str(file) in (tmp_path / ".bashrc").read_text()

    def offered(*words: str) -> set[str]:
        place = len(words) - 1
        script = f"""source {file}; COMP_WORDS=({" ".join(map(repr, words))}); COMP_CWORD={place}
            function=$(complete -p megainter | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $function megainter {words[-1]!r} {words[-2]!r}
            printf '%s\\n' "${{COMPREPLY[@]}}" """
        shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=own)
        return set(shown.stdout.split())

    assert offered("megainter", "pre") == {"prepare", "pretrain", "preflight"}
    assert {"--images", "--output"} <= offered("megainter", "extract", "--")
    assert {"retrieval", "vcr"} <= offered("megainter", "evaluate", "")


def test_sigterm_in_the_first_seconds_is_one_line(tmp_path: Path) -> None:
    """Amid imports, before anything that saves has taken the signal over: as Ctrl-C."""
    pairs, store = write_data(tmp_path, images=12)
    command = [sys.executable, "-X", "importtime", "-m", "megainter", "pretrain", *settings(pairs, store, tmp_path / "run")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).rpartition("|")[2].strip().startswith("torch"):  # its first modules have come
            assert line
        process.terminate()
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 75, rest
    assert rest == ["megainter: interrupted; the same command goes on where it stopped\n"]
