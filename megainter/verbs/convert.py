"""`megainter convert`: checkpoints in and out."""

from pathlib import Path

from cyclopts import App

convert_app = App(name="convert", help="Move checkpoints in and out.")


@convert_app.command(name="zero")
def convert_zero(run: Path, dst: Path, /) -> None:
    """Export a training run to a Hugging Face folder.

    Parameters
    ----------
    run
        Run folder (its newest whole checkpoint is taken) or one checkpoint folder.
    dst
        Folder to write; must not exist.
    """
    from megainter.conversion.zero import convert

    convert(run, dst)
