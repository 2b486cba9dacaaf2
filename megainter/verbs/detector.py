"""`megainter detector`: a Faster R-CNN trained on boxes of one's own, and any detector tried on a known photo."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from megainter.paths import require_there
from megainter.verbs.as_json import lines_aside, print_object
from megainter.weights import check_name
from preprocessing.detector.settings import DetectorRun, DetectorTraining

detector_app = App(name="detector", help="Train a detector on boxes of your own, or try one on a known photo.")
USUAL = DetectorTraining()


@detector_app.command
def train(*, run: Annotated[DetectorRun, Parameter(name="*")], training: Annotated[DetectorTraining, Parameter(name="*")] = USUAL) -> None:
    """Train a Faster R-CNN on a boxes manifest; the result is OUTPUT/detector.safetensors, for `megainter extract --weights`.

    The same command goes on where an earlier one stopped.
    """
    for option, path in (("--boxes", run.boxes), ("--images", run.images), ("--validation", run.validation)):
        require_there(path, option)
    from preprocessing.detector.command import train as run_training

    run_training(run, training)


@detector_app.command
def check(*, weights: Path, image: Path, regions: Path | None = None, device: str = "cpu", json: bool = False) -> None:
    """Compare what a detector says of a known photo with what it should say: swapped colours, classes in another order.

    Exit code 4 where something is swapped; the line says what.

    Parameters
    ----------
    weights
        Detector weights of any known kind, a file or a name as for `megainter extract`.
    image
        The photo.
    regions
        LXMERT TSV file with a row of the photo, from the same weights.
    device
        Torch device: cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one.
    json
        Print one JSON object for scripts: the figures, and what is wrong.
    """
    check_name(weights, "detector", "--weights")
    for option, path in (("--image", image), ("--regions", regions)):
        require_there(path, option)
    from preprocessing.detector.check import check as run_check
    from preprocessing.detector.check import facts, require_right

    with lines_aside(json):
        finding = run_check(weights, image, regions, device)
    if json:
        print_object({"weights": weights, "image": image, **facts(finding)})
    require_right(weights, finding)
    if not json:
        print("colours and classes are as they should be")
