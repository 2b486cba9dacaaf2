"""Pictures as ``data:`` URIs: an image with its regions, and the curves of a run."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from megainter.data.record import RegionRecord
from megainter.training.metrics import read_metrics

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
OBJECTIVES = {"msm": "masked segments", "mrm": "masked regions", "itm": "matching"}
WIDTH = 320  # pixels of a shown image


def data_uri(image: Image.Image) -> str:
    """The image as an embedded JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(path: Path, width: int = WIDTH) -> Image.Image:
    """The image in RGB, ``width`` pixels wide."""
    with Image.open(path) as image:
        return image.convert("RGB").resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def with_regions(path: Path, record: RegionRecord, names: tuple[str, ...], most: int = 12) -> Image.Image:
    """The image with the ``most`` regions its detector is surest of, each with its best class (background aside) and probability."""
    picture = thumbnail(path)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    scale = picture.width / record.width
    best, sure = record.class_probs[:, 1:].argmax(axis=1) + 1, record.class_probs[:, 1:].max(axis=1)
    for place, row in enumerate(sure.argsort()[::-1][:most]):
        colour = COLOURS[place % len(COLOURS)]
        x1, y1, x2, y2 = (float(value) * scale for value in record.boxes[row])
        label = f"{names[best[row]]} {sure[row]:.2f}"
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        left, top, right, bottom = draw.textbbox((x1 + 2, max(y1 - 13, 0)), label, font=font)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        draw.text((x1 + 2, max(y1 - 13, 0)), label, fill="white", font=font)
    return picture


def curves(metrics: Path) -> str:
    """Losses and validation accuracies over steps, as an embedded PNG."""
    training, validation = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for colour, (key, name) in zip(COLOURS, OBJECTIVES.items(), strict=False):
        losses.plot(_column(training, "step"), _column(training, f"{key}_loss"), color=colour, label=name)
        losses.plot(_column(validation, "step"), _column(validation, f"{key}_loss"), color=colour, linestyle="none", marker="o", markersize=4)
        accuracies.plot(_column(validation, "step"), _column(validation, f"{key}_accuracy"), color=colour, marker="o", markersize=4, label=name)
    losses.set(title="loss (line: training, dots: validation)", xlabel="step", ylim=(0, None))
    accuracies.set(title="validation accuracy", xlabel="step", ylim=(0, 1))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _column(records: list[dict], key: str) -> list[float]:
    return [record[key] for record in records]
