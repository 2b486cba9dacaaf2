"""The page: complete, self-contained, and harmless whatever the captions say."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.errors import UsageError
from megainter.tasks.retrieval.report import write_scores
from megainter.view.curves import draw_curves
from megainter.view.page import write_page
from megainter.view.pages import counted, plain
from megainter.view.pictures import region_boxes, spread, thumbnail
from megainter.view.retrieved import recalls
from megainter.weights import locate

IMAGES = 8
HOSTILE = "<script>alert('&\"')</script>\x1b[31m\u202e caption"
NAMES = ("__background__", "<b>cat</b>", "dog")


class Tags(HTMLParser):
    """Collects start tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag and kind in (attributes.get("class") or "")]


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Path]:
    return run_of_retrieval(tmp_path)


def run_of_retrieval(tmp_path: Path) -> dict[str, Path]:
    """Eight images with three regions each, one hostile caption, curves, and retrieval scores in which caption i ranks its image i + 1."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with FeatureStoreWriter(tmp_path / "store", StoreSchema(4, len(NAMES), NAMES, "tiny")) as writer:
        for i in range(IMAGES):
            Image.fromarray(rng.integers(0, 255, (30, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / "sub" / f"{i}.png")
            boxes = np.array([[0, 0, 30, 15], [30, 15, 60, 30], [10, 10, 20, 20]], dtype=np.float32)
            probs = np.array([[0.1, 0.8, 0.1], [0.1, 0.0, 0.9], [0.6, 0.3, 0.1]], dtype=np.float32)
            writer.add(f"id{i}", RegionRecord(boxes, np.ones((3, 4), np.float16), probs, 60, 30))
    seal_store(tmp_path / "store")
    captions = [HOSTILE, *(f"caption {i}" for i in range(1, IMAGES))]
    rows = [Pair(f"{i}#{k}", f"id{i}", f"sub/{i}.png", captions[i], "test") for i in range(IMAGES) for k in range(2)]
    write_pairs(tmp_path / "pairs.parquet", rows)
    write_retrieval(tmp_path, captions)
    records = [
        {"kind": "train", "step": s, "msm_loss": 5.0 / s, "mrm_loss": 3.0, "itm_loss": 0.7, "samples_per_second": 9.0} for s in range(1, 60)
    ]
    records.append(
        {"kind": "validation", "step": 59, "msm_loss": 1.0, "mrm_loss": 3.0, "itm_loss": 0.6, "msm_accuracy": 0.5, "itm_accuracy": 0.75}
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"images": "images", "pairs": "pairs.parquet", "store": "store", "metrics": "metrics.jsonl", "retrieval": "scores.json"}
    return {name: tmp_path / file for name, file in names.items()}


def write_retrieval(folder: Path, captions: list[str]) -> None:
    """A report and its top file, as the evaluation writes them."""
    orders = [[(i + 1 + place) % IMAGES for place in range(IMAGES)] for i in range(IMAGES)]
    for i, order in enumerate(orders):
        order.remove(i)
        order.insert(i, i)  # so that the rank is i + 1
    top = {
        "pair_id": [f"{i}#0" for i in range(IMAGES)],
        "image_id": [f"id{i}" for i in range(IMAGES)],
        "caption": captions,
        "rank": list(range(1, IMAGES + 1)),
        "images": [[f"id{image}" for image in order] for order in orders],
        "scores": [[2.0 - place for place in range(IMAGES)] for _ in orders],
    }
    pq.write_table(pa.table(top), folder / "scores.top.parquet")
    recall = {f"{name}_at_{k}": 0.25 for name in ("r", "chance") for k in (1, 5, 10)}
    recall |= {"queries": IMAGES, "candidates": IMAGES, "median_rank": 4, "mean_rank": 4.5}
    report = {
        "text_to_image": recall,
        "image_to_text": recall,
        "images": IMAGES,
        "captions": IMAGES,
        "split": "test",
        "top": "scores.top.parquet",
    }
    (folder / "scores.json").write_text(json.dumps(report))


def test_captions_and_class_names_are_escaped_and_stripped(run: dict[str, Path], tmp_path: Path) -> None:
    page = write_page(tmp_path / "out" / "page.html", "<i>title</i>", **run, count=IMAGES).read_text()
    tags = Tags(page)
    assert not tags.of("script")
    assert not tags.of("i")
    assert "&lt;script&gt;alert(&#39;&amp;&#34;&#39;)&lt;/script&gt;[31m caption" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert page.count("&lt;b&gt;cat&lt;/b&gt; 0.80") == 2 * IMAGES  # as a tooltip and as a label
    policy = next(meta for meta in tags.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_detector_is_named_by_its_name_or_by_its_classes(run: dict[str, Path], tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "t", **{**run, "retrieval": None}).read_text()
    assert "8 images with regions, by a detector of 2 classes (&lt;b&gt;cat&lt;/b&gt;, dog), tiny" in page
    locate("photos", "detector").record(run["store"])
    page = write_page(tmp_path / "page.html", "t", **{**run, "retrieval": None}).read_text()
    assert "8 images with regions, by the detector photos" in page


def test_everything_is_inside_and_decodes(run: dict[str, Path], tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "run", **run, count=IMAGES).read_text()
    sources = [image["src"] or "" for image in Tags(page).of("img")]
    late = 3  # captions 5, 6 and 7 have their own image at ranks 6 to 8
    hardest = IMAGES - 1  # all but the one that was found first
    charts = 2
    assert len(sources) == IMAGES + charts + IMAGES * 5 + late + hardest * 5 + late
    for source in sources:
        kind, _, content = source.partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        image.load()
        assert kind == f"data:image/{(image.format or '').lower()}"
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    assert not {"link", "iframe", "object", "form"} & {tag for tag, _ in Tags(page).found}


def test_own_images_are_marked_once_per_caption(run: dict[str, Path], tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "run", **run, count=IMAGES).read_text()
    first, hardest = page.split("The hardest errors")
    assert len(Tags(first).of("figure", "own")) == IMAGES
    assert len(Tags(first).of("figure", "late")) == 3
    assert page.count("found first") == 1
    assert [int(rank) for rank in re.findall(r"own image at rank (\d+)", hardest)] == [8, 7, 6, 5, 4, 3, 2]  # the worst first
    assert len(Tags(hardest).of("figure", "own")) == IMAGES - 1
    assert "id0" in re.findall(r'alt="([^"]*)"', hardest)[:1]  # what was put first for caption 7
    assert "own image at rank 8" in page
    assert "88.1%" in page  # log-odds of 2
    assert "last validation: accuracy of masked segments 50.0%, accuracy of matching 75.0%" in page


def test_images_whose_captions_rank_worst_are_shown_where_all_scores_are_beside_the_report(run: dict[str, Path], tmp_path: Path) -> None:
    """Caption c of image i: a score of 1 beside its own image, and of 2 beside those after it, so that image i has i wrong ones ahead."""
    pairs = read_pairs(run["pairs"])
    own = np.arange(IMAGES)
    scores = np.where(own[None, :] < own[:, None], 2.0, np.where(own[None, :] == own[:, None], 1.0, 0.0)).astype(np.float32)  # [I, C]
    gallery = SimpleNamespace(image_ids=[f"id{i}" for i in range(IMAGES)], pairs=pairs, rows=2 * own, image_of_caption=own)
    write_scores(tmp_path / "matrix.parquet", scores, gallery)
    report = json.loads(run["retrieval"].read_text()) | {"scores": "/elsewhere/matrix.parquet"}
    run["retrieval"].write_text(json.dumps(report))
    page = write_page(tmp_path / "page.html", "run", **run, count=3).read_text()
    shown = page.split("The hardest images")[1].split("Images and their regions")[0]
    assert re.findall(r'alt="(id\d)"', shown) == ["id7", "id6", "id5"]
    assert [int(rank) for rank in re.findall(r"its own, at rank (\d+)", shown)] == [8, 7, 6]
    first = [plain(re.sub("<[^>]+>", "", item)).strip() for item in re.findall(r"<li[^>]*>(.*?)</li>", shown, flags=re.DOTALL)][:6]
    assert first[0].startswith("&lt;script&gt;")  # caption 0, of the wrong ones of equal score the first
    assert first[1:] == [*(f"caption {i} 88.1%" for i in (1, 2, 3, 4)), "caption 7 73.1%, its own, at rank 8"]
    gallery.rows = gallery.rows[::-1]
    write_scores(tmp_path / "matrix.parquet", scores, gallery)
    with pytest.raises(UsageError, match=r"matrix\.parquet has the scores of other captions than scores\.json"):
        write_page(tmp_path / "page.html", "run", **run, count=3)
    (tmp_path / "matrix.parquet").unlink()
    assert "The hardest images" not in write_page(tmp_path / "page.html", "run", **run, count=3).read_text()


def test_regions_lie_where_the_record_says(run: dict[str, Path], tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", "run", **run, count=2).read_text()
    boxes = Tags(page).of("div", "box")
    assert len(boxes) == 2 * 3
    assert sum("unsure" in (box["class"] or "") for box in boxes) == 2
    dog = next(box for box in boxes if box["title"] == "dog 0.90")
    assert (dog["style"] or "").startswith("left: 50.0%; top: 50.0%; width: 50.0%; height: 50.0%;")


def test_count_limits_what_is_shown_and_sections_without_data_are_left_out(run: dict[str, Path], tmp_path: Path) -> None:
    bare = {name: run[name] for name in ("images", "pairs", "store")}
    page = write_page(tmp_path / "page.html", "images alone", **bare, count=3).read_text()
    assert len(Tags(page).of("img")) == 3
    assert [title in page for title in ("Retrieval", "Training", "Captions and")] == [False] * 3
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(0, 3) == []


def test_a_turned_photo_is_shown_upright(run: dict[str, Path], tmp_path: Path) -> None:
    """A camera's orientation tag: the store's boxes are those of the upright image."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 60)).save(run["images"] / "sub" / "0.png", exif=exif)
    bare = {name: run[name] for name in ("images", "pairs", "store")}
    page = write_page(tmp_path / "page.html", "t", **bare, count=1).read_text()
    content = (Tags(page).of("img")[0]["src"] or "").partition(";base64,")[2]
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (60, 30)


def test_missing_files_are_one_clear_line(run: dict[str, Path], tmp_path: Path) -> None:
    faults = [
        ("images", tmp_path, "cannot be read"),
        ("metrics", tmp_path / "no.jsonl", "no.jsonl does not exist"),
        ("store", tmp_path, "store"),
    ]
    for name, path, text in faults:
        with pytest.raises(UsageError, match=text):
            write_page(tmp_path / "page.html", "t", **{**run, name: path})
    (tmp_path / "scores.top.parquet").unlink()
    with pytest.raises(UsageError, match=r"scores\.top\.parquet is missing"):
        write_page(tmp_path / "page.html", "t", **run)
    with pytest.raises(UsageError, match="--count is 0"):
        write_page(tmp_path / "page.html", "t", **run, count=0)


def test_a_report_with_a_first_stage_has_rows_of_both_and_of_each(run: dict[str, Path]) -> None:
    report = json.loads(run["retrieval"].read_text())
    assert [row["name"] for row in recalls(report)["rows"]] == ["text to image", "image to text"]
    assert "every pair scored" in recalls(report)["note"]

    better = {way: report[way] | {"r_at_1": 0.75} for way in ("text_to_image", "image_to_text")}
    staged = report | {"prefilter": better | {"candidates": 4, "pairs": 50}, "both_stages": better | {"weight": 1.0}}
    rows = {row["name"]: row["recalls"][0][0] for row in recalls(staged)["rows"]}
    assert list(rows)[:3] == ["text to image, both stages", "text to image, matching", "text to image, first stage"]
    assert (rows["image to text, both stages"], rows["image to text, first stage"]) == (0.75, 0.75)
    assert rows["image to text, matching"] == report["image_to_text"]["r_at_1"]
    of_all = f"(50 of {report['captions'] * report['images']:,} pairs)"
    assert f"the 4 nearest by vectors of each scored by the matching head {of_all}" in recalls(staged)["note"]


@pytest.mark.parametrize(
    "content", [{"lines": 300, "bad": []}, [], {"split": None, "images": 1, "captions": 1, "top": "scores.top.parquet"}]
)
def test_a_json_of_another_kind_is_no_retrieval_report(run: dict[str, Path], tmp_path: Path, content: object) -> None:
    (tmp_path / "pairs.parquet.report.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"report\.json is no report of retrieval; give the JSON"):
        write_page(tmp_path / "page.html", "t", **{**run, "retrieval": tmp_path / "pairs.parquet.report.json"})


def test_a_folder_is_no_place_for_the_page(run: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--output .*images is a folder; give the name of a file"):
        write_page(run["images"], "t", **run)


def test_one_thing_is_singular() -> None:
    assert [counted(number, "region") for number in (0, 1, 2, 3000)] == ["0 regions", "1 region", "2 regions", "3,000 regions"]


def test_plain_keeps_every_script_and_drops_what_is_invisible() -> None:
    assert plain("两只狗 über \u202eabc\u200b\x07\n") == "两只狗 über abc"


def test_background_is_never_a_region_class() -> None:
    record = RegionRecord(
        np.array([[0, 0, 1, 1]], np.float32), np.ones((1, 4), np.float16), np.array([[0.9, 0.04, 0.06]], np.float32), 2, 2
    )
    [box] = region_boxes(record, NAMES)
    assert box.label == "dog 0.06"
    assert not box.sure


def test_thumbnails_have_nothing_of_the_file_but_its_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "do not tell"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=exif, comment=b"do not tell")
    content = base64.b64decode(thumbnail(tmp_path / "a.jpg", 20).partition(",")[2])
    assert b"do not tell" in (tmp_path / "a.jpg").read_bytes()
    assert b"do not tell" not in content
    assert Image.open(io.BytesIO(content)).size == (20, 15)


def test_recalls_of_validations_have_a_chart_and_a_note_of_their_own(run: dict[str, Path]) -> None:
    plain = draw_curves(run["metrics"])
    with open(run["metrics"], "a", encoding="utf-8") as file:
        for step, recall in ((30, 0.25), (59, 0.5)):
            found = {"text_to_image_r_at_1": recall, "vectors_text_to_image_r_at_1": recall / 2, "vectors_image_to_text_r_at_1": 0.1}
            file.write(json.dumps({"kind": "validation", "step": step, "msm_accuracy": 0.5, **found}) + "\n")
    found = draw_curves(run["metrics"])
    assert [chart["name"] for chart in found["charts"]] == [
        *(chart["name"] for chart in plain["charts"]),
        "recall on the validation gallery",
    ]
    assert "text to image R@1 50.0%, vectors text to image R@1 25.0%" in found["note"]
    assert "R@1" not in plain["note"]
