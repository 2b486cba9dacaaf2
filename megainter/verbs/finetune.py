"""`megainter finetune`: a pretrained model on a task; a recipe and settings laid over it, as in `megainter pretrain`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from megainter.verbs.pretrain import split_config

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
    from megainter.tasks.retrieval_training import RetrievalConfig

    config = read_task_settings("retrieval", RetrievalConfig, settings)
    if config is not None:
        from megainter.tasks.retrieval_training import finetune

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
    from megainter.tasks.vcr_training import VcrConfig

    config = read_task_settings("vcr", VcrConfig, settings)
    if config is not None:
        from megainter.tasks.vcr_training import finetune

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
    from megainter.tasks.classification_training import ClassificationConfig

    config = read_task_settings("classification", ClassificationConfig, settings)
    if config is None:
        return
    if compare_with is not None:
        from megainter.tasks.classification_comparison import compare

        compare(config, compare_with)
        return
    from megainter.tasks.classification_training import finetune

    finetune(config)


def read_task_settings(task: str, kind: type[Any], settings: Sequence[str]) -> Any:
    """The configuration of this ``kind`` that the settings give; None where they ask for help, which is printed."""
    from megainter.config import describe_settings, read_settings, shipped_recipes

    if not settings or {"--help", "-h"} & set(settings):
        usage = f"usage: megainter finetune {task} --config RECIPE [--section.key value ...]"
        recipes = f"RECIPE is a TOML file, or one of those that come along: {', '.join(shipped_recipes(f'finetune {task}'))}."
        print(f"{usage}\n\n{recipes} Settings lie over it; the same command resumes.\n\n{describe_settings(kind)}")
        return None
    recipe, overrides = split_config(settings)
    return read_settings(kind, recipe, overrides)
