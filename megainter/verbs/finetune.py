"""`megainter finetune`: a pretrained model on a task; a recipe and settings laid over it, as in `megainter pretrain`."""

from collections.abc import Sequence
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
