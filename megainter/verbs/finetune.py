"""`megainter finetune`: a pretrained model on a task; a recipe and settings laid over it, as in `megainter pretrain`."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from megainter.errors import UsageError
from megainter.paths import require_there
from megainter.tracking import require_trackers
from megainter.verbs.pretrain import PRINT_CONFIG, PRINTING, require_paths, split_config, take_flag
from megainter.weights import check_name

if TYPE_CHECKING:
    from megainter.config.settings import FinetuneConfig

TASKS = ("retrieval", "vcr", "classification")  # that take a recipe
Settings = Annotated[str, Parameter(allow_leading_hyphen=True)]

finetune_app = App(name="finetune", help="Fine-tune a pretrained model on a task.")


@finetune_app.command(name="retrieval", help_flags=[])
def finetune_retrieval(*settings: Settings) -> None:
    """Image-text retrieval: --config retrieval --model.start_from MODEL --data.pairs ... --data.store ... --output RUN.

    Alone, or on every rank of a launcher: deepspeed --module megainter.finetune retrieval --config ... The same command resumes. RUN/model
    is the result.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --training.epochs 5.
    """
    config = read_task_settings("retrieval", settings)
    if config is not None:
        from megainter.tasks.retrieval.training import finetune

        finetune(config)


@finetune_app.command(name="vcr", help_flags=[])
def finetune_vcr(*settings: Settings) -> None:
    """VCR, questions about named objects: --config vcr --model.start_from MODEL --data.questions ... --data.store ... --output RUN.

    Alone, or on every rank of a launcher: deepspeed --module megainter.finetune vcr --config ... The same command resumes. RUN/model is
    the result.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --data.mode answer.
    """
    config = read_task_settings("vcr", settings)
    if config is not None:
        from megainter.tasks.vcr.training import finetune

        finetune(config)


@finetune_app.command(name="classification", help_flags=[])
def finetune_classification(*settings: Settings, compare_with: Path | None = None) -> None:
    """Labelled texts, alone or about images: --config classification --model.start_from MODEL --data.examples ... --output RUN.

    Alone, or on every rank of a launcher: deepspeed --module megainter.finetune classification --config ... The same command resumes.
    RUN/model is the result.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --training.epochs 5.
    compare_with
        Folder of the BERT that the model came from: fine-tune it alike in RUN/bert, and set both side by side (texts alone).
    """
    config = read_task_settings("classification", settings)
    if config is None:
        return
    if compare_with is not None:
        require_there(compare_with, "--compare-with")
        from megainter.tasks.classification.comparison import compare

        compare(config, compare_with)
        return
    from megainter.tasks.classification.training import finetune

    finetune(config)


@finetune_app.command(name="prefilter")
def finetune_prefilter(
    model: Path,
    /,
    *,
    pairs: Path,
    store: Path,
    output: Path,
    split: str = "train",
    epochs: int = 10,
    batch: int = 1024,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    dropout: float = 0.2,
    max_regions: int = 36,
    max_text_tokens: int = 36,
    max_bad: float = 0.01,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """The first stage of retrieval in large galleries: a light dual encoder, for `megainter evaluate retrieval --prefilter`.

    Parameters
    ----------
    model
        Hugging Face folder whose vocabulary and word embeddings it begins with.
    pairs
        Pairs manifest.
    store
        Feature store of the captions' images.
    output
        Folder for the dual encoder.
    split
        Split of the manifest that is trained on.
    epochs
        How often every caption is seen.
    batch
        Captions of a step: each has the others' images for wrong answers.
    learning_rate
        Largest rate, after a tenth of the steps; it falls to 0.
    weight_decay
        Weight decay of the linear layers.
    dropout
        Share of words, regions and hidden values that are left out at random.
    max_regions
        Regions per image.
    max_text_tokens
        Tokens per caption.
    max_bad
        Share of images that may lack regions, their captions left out; one may in any case, unless this is 0.
    seed
        Random seed of order, start and dropout.
    device
        Torch device; "auto" takes CUDA where there is one.
    """
    check_name(model, option="MODEL")
    for option, path in (("--pairs", pairs), ("--store", store)):
        require_there(path, option)
    from megainter.tasks.retrieval.prefilter.training import PrefilterTraining, finetune

    training = PrefilterTraining(
        epochs=epochs, batch=batch, learning_rate=learning_rate, weight_decay=weight_decay, dropout=dropout, seed=seed
    )
    finetune(
        model, pairs, store, output=output, split=split, max_regions=max_regions, max_text_tokens=max_text_tokens,
        max_bad=max_bad, training=training, device=device,
    )  # fmt: skip


def configuration(words: Sequence[str]) -> "FinetuneConfig":
    """The settings of ``finetune`` with these words: a task, and what is set; ``UsageError`` where they are wrong."""
    from megainter.config.reading import read_settings

    kind = kind_of(words[0] if words else "")
    settings = finetune_app.parse_args(words, exit_on_error=False, print_error=False)[1].args
    return read_settings(kind, *split_config(settings))


def kind_of(task: str) -> "type[FinetuneConfig]":
    """The settings of a task; ``UsageError`` where it is none."""
    match task:
        case "retrieval":
            from megainter.tasks.retrieval.settings import RetrievalConfig

            return RetrievalConfig
        case "vcr":
            from megainter.tasks.vcr.settings import VcrConfig

            return VcrConfig
        case "classification":
            from megainter.tasks.classification.settings import ClassificationConfig

            return ClassificationConfig
    if not task:
        raise UsageError(f"finetune needs a task: {', '.join(TASKS)}")
    near = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(TASKS)}"
    raise UsageError(f"finetune {task!a:.80} is not a task; {hint}")


def read_task_settings(task: str, settings: Sequence[str]) -> Any:
    """The task's configuration that the settings give; None where they ask for help or for the configuration, which is printed."""
    from megainter.config.help import describe_settings
    from megainter.config.reading import read_settings, shipped_recipes
    from megainter.config.resolved import resolved_settings

    kind = kind_of(task)
    if not settings or {"--help", "-h"} & set(settings):
        usage = f"usage: megainter finetune {task} --config RECIPE [--section.key value ...]"
        recipes = f"RECIPE is a TOML file, or one of those that come along: {', '.join(shipped_recipes(f'finetune {task}'))}."
        changes = "--section.key value changes a setting of the recipe; the same command resumes."
        print(f"{usage}\n\n{recipes} {changes}\n{PRINTING}\n\n{describe_settings(kind)}")
        return None
    asked, rest = take_flag(PRINT_CONFIG, settings)
    recipe, overrides = split_config(rest)
    config = read_settings(kind, recipe, overrides)
    if asked:
        print(resolved_settings(config, recipe, overrides))
        return None
    require_paths(config)
    require_trackers(config.tracking)
    return config
