"""Settings: strict, typed, one line per mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from megainter.config.help import describe_settings
from megainter.config.portions import accumulation_steps
from megainter.config.reading import find_recipe, load_config, read_settings, verb_of
from megainter.config.settings import ModelSettings, RunConfig, as_dict
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.vcr.settings import VcrConfig
from tests.places import ROOT

RECIPES = sorted((ROOT / "megainter" / "recipes").glob("*.toml"))
GOOD = ["--output", "run", "--data.pairs", "p.parquet", "--data.store", "s", "--training.steps", "10"]


def test_command_line_lies_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('output = "a"\n[data]\npairs = "p"\nstore = "s"\n[training]\nsteps = 5\nmicro_batch = 8\n')
    config = load_config(recipe, ["--training.steps=7", "--training.global-batch", "16", "--model.fusion", "sum"])
    assert (config.output, config.training.steps, config.training.micro_batch, config.training.global_batch) == (Path("a"), 7, 8, 16)
    assert config.model.fusion == "sum"


def test_a_length_on_the_command_line_replaces_the_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[training]\nepochs = 5\n")
    training = load_config(recipe, GOOD).training
    assert (training.steps, training.epochs) == (10, None)
    with pytest.raises(UsageError, match="exactly one"):
        load_config(recipe, [*GOOD, "--training.epochs", "2"])


TASKS = {"finetune retrieval": RetrievalConfig, "finetune vcr": VcrConfig, "finetune classification": ClassificationConfig}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_what_they_are(recipe: Path) -> None:
    opening = recipe.read_text().split("\n\n")[0]
    kind = next((kind for verb, kind in TASKS.items() if verb in opening.partition("\n")[0]), None)
    config = load_config(recipe) if kind is None else read_settings(kind, recipe)
    assert accumulation_steps(config.training, 1) >= 1
    assert "--config" in opening
    assert "Expected" in opening


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--training.stpes", "5"], ["training.stpes", "did you mean training.steps"]),
        (["--trainning.steps", "5"], ["trainning.steps", "did you mean training.steps"]),
        (["--optimizer.learning_rate", "fast"], ["optimizer.learning_rate", "'fast'"]),
        (["--engine.zero_stage", "4"], ["engine.zero_stage", "3"]),
        (["--training.epochs", "2"], ["exactly one of training.steps and training.epochs; both are there: leave one out"]),
        (["--checkpoint.keep_every", "1500"], ["keep_every 1500 is not a multiple of checkpoint.every_steps 1000"]),
        (
            ["--training.micro_batch", "1024"],
            ["micro_batch 1024 exceeds training.global_batch 512: give --training.micro_batch 512 or less"],
        ),
        (
            ["--model.hidden_size", "100"],
            ["100 is not divisible by model.num_attention_heads 12: give --model.num_attention_heads 10, or --model.hidden_size 96 or 120"],
        ),
        (["--data.max_text_tokens", "600"], ["600 exceeds model.max_position_embeddings 512"]),
        (["--engine.precision", "fp16", "--engine.zero_stage", "0"], ["fp16 needs engine.zero_stage 1, 2 or 3"]),
        (["--training.msm_weight", "0", "--training.mrm_weight", "0", "--training.itm_weight", "0"], ["all objective weights are 0"]),
        (["--training.mrm_weight", "0", "--data.conditional_masking", "true"], ["one of them is never masked: leave it out"]),
        (["--training.itm_weight", "0", "--data.hard_negatives", "hard"], ["data.hard_negatives is about mismatched captions"]),
        (["stray"], ["'stray' is not an option"]),
        (["--data.split"], ["--data.split needs a value"]),
        (["--output.deep", "1"], ["output is a value, not a section"]),
    ],
)
def test_mistakes_are_one_clear_line(tokens: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, GOOD + tokens)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(("content", "word"), [("[data\n", "not valid TOML"), ("[data]\npears = 1\n", "did you mean data.pairs")])
def test_broken_recipe_is_named(content: str, word: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(content)
    with pytest.raises(UsageError, match=word) as caught:
        load_config(recipe, GOOD)
    assert str(recipe) in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_another_verb_is_told_with_the_right_command(recipe: Path, tmp_path: Path) -> None:
    verb = verb_of(recipe)
    own = tmp_path / "own.toml"
    own.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("#")))
    for kind in (RunConfig, *TASKS.values()):
        if kind.verb == verb:
            read_settings(kind, Path(recipe.stem))
            continue
        with pytest.raises(UsageError, match=rf"`megainter {verb} --config {recipe.stem}`; here give one of `{kind.verb}`"):
            read_settings(kind, Path(recipe.stem))
        with pytest.raises(UsageError, match=rf"`megainter {verb} --config {own}`"):  # by its settings alone
            read_settings(kind, own)


def test_a_setting_under_its_earlier_name_is_told_the_new_one() -> None:
    with pytest.raises(UsageError, match=r"unknown setting data\.max_missing; did you mean data\.max_bad\?"):
        load_config(None, [*GOOD, "--data.max_missing", "0.1"])


def test_what_is_wrong_in_a_recipe_is_named_by_its_line_and_section(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    for content, told in (
        ("[data]\nmasking = bert\n", r"line 2, column \d+\); did you mean masking = \"bert\"\?"),
        ("[data]\nsplit 3\n", r"line 2, column \d+\): split 3"),
        ("[modell]\nx = 1\n", r"unknown setting modell in .*; did you mean the section model\?"),
    ):
        recipe.write_text(content)
        with pytest.raises(UsageError, match=told):
            load_config(recipe, GOOD)


def test_a_mistake_is_where_it_was_made(tmp_path: Path) -> None:
    """A recipe is not blamed for what stands on the command line."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\nsplit = "train"\n')
    with pytest.raises(UsageError, match=r"^setting --validation\.samples: "):
        load_config(recipe, [*GOOD, "--validation.samples", "x"])
    recipe.write_text('[validation]\nsamples = "x"\n')
    with pytest.raises(UsageError, match=rf"^setting validation\.samples in {recipe}: "):
        load_config(recipe, GOOD)


def test_missing_recipe_and_missing_setting() -> None:
    with pytest.raises(UsageError, match="recipe bsae does not exist; did you mean base"):
        load_config(Path("bsae"))
    with pytest.raises(UsageError, match=r"nowhere\.toml does not exist"):
        load_config(Path("nowhere.toml"))
    with pytest.raises(UsageError, match=r"setting data\.store is missing"):
        load_config(None, [*GOOD[:4], "--training.steps", "1"])


def test_batch_must_divide_over_processes() -> None:
    config = load_config(None, [*GOOD, "--training.global_batch", "96", "--training.micro_batch", "16"])
    assert [accumulation_steps(config.training, size) for size in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UsageError, match="global_batch 96 is not a multiple"):
        accumulation_steps(config.training, 4)


def test_resolved_settings_round_trip(tmp_path: Path) -> None:
    config = load_config(None, [*GOOD, "--tracking", "wandb,mlflow"])
    again = load_config(None, [text for key, value in _flat(as_dict(config)) if value is not None for text in (f"--{key}", _typed(value))])
    assert again == config


def _typed(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _flat(settings: dict) -> list[tuple[str, object]]:
    return [(f"{a}.{b}", value) for a, inner in settings.items() if isinstance(inner, dict) for b, value in inner.items()] + [
        (a, value) for a, value in settings.items() if not isinstance(value, dict | type(None))
    ]


@pytest.mark.parametrize("kind", [RunConfig, *TASKS.values()], ids=lambda kind: kind.__name__)
def test_help_lists_and_explains_every_setting(kind: type) -> None:
    text = describe_settings(kind)
    for section in dataclasses.fields(kind):
        keys = dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else ()
        for name in [f"{section.name}.{key.name}" for key in keys] or [section.name]:
            assert re.search(rf"^  --{re.escape(name)} .*\n      (?!None)\S.*\.$", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("kind", [RunConfig, *TASKS.values()], ids=lambda kind: kind.__name__)
def test_help_fits_a_wide_terminal(kind: type) -> None:
    assert max(map(len, describe_settings(kind).splitlines())) <= 160


THE_RUNS, THE_DATAS = ("start_from", "gradient_checkpointing", "itc_size"), ("vocab_size", "region_feature_size", "num_region_classes")


def test_model_settings_have_the_names_and_defaults_of_the_configuration() -> None:
    official = InterBertConfig()
    for field in dataclasses.fields(ModelSettings):
        if field.name not in (*THE_RUNS, *THE_DATAS):
            assert getattr(official, field.name) == field.default, field.name
    assert official.itc_size == 0, "without training.itc_weight there are no vectors, whatever their width would be"


def test_a_folder_of_a_recipes_name_hides_it_not_and_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`megainter demo --output demo` makes such a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_recipe(Path("demo")).name == "demo.toml"
    (tmp_path / "base").write_text("")
    assert find_recipe(Path("base")) == Path("base")
