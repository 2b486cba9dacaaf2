"""`megainter demo`."""

from pathlib import Path


def demo(*, output: Path = Path("demo-run")) -> None:
    """Run everything once on composed scenes: extract, pretrain, evaluate, export, and a page to look at.

    Stages that are finished are not run again; each leaves its files in the output folder.

    Parameters
    ----------
    output
        Folder for everything the demo makes.
    """
    from megainter.demo import run_demo

    run_demo(output)
