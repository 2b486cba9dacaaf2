"""One image under the names that different projects give it."""

import pytest

from megainter.data.image_ids import forms, match, number, renamer
from megainter.errors import UsageError


@pytest.mark.parametrize(
    ("image_id", "found"),
    [
        ("391895", 391895),
        ("COCO_val2014_000000391895", 391895),
        ("val2014/COCO_val2014_000000391895.jpg", 391895),
        ("000000391895.jpg", 391895),
        ("coco_val2014_000000391895", 391895),
        ("flickr30k_1000092795", 1000092795),
        ("VG_100K_2/2", 2),
        ("beach12", None),
        ("scene_000012", None),
        ("a/b", None),
        ("", None),
    ],
)
def test_the_number_of_an_image(image_id: str, found: int | None) -> None:
    assert number(image_id) == found


def test_the_forms_of_an_id_from_strict_to_loose() -> None:
    assert forms("a/b.jpg") == ("a/b.jpg", "a/b", "b", "b", "")
    assert forms("IMG_0042.HEIC")[1] == forms("scans/IMG_0042.tiff")[2] == "IMG_0042"
    assert forms("x/COCO_val2014_000000000012") == ("x/COCO_val2014_000000000012",) * 2 + ("COCO_val2014_000000000012",) * 2 + ("12",)
    assert forms("v1.5 of it") == ("v1.5 of it", "v1.5 of it", "v1.5 of it", "v1", "")


KARPATHY = [f"val2014/COCO_val2014_{n:012d}" for n in range(100, 120)]


@pytest.mark.parametrize(
    ("stored", "form"),
    [
        (KARPATHY, "id"),
        ([f"{name}.jpg" for name in KARPATHY], "id without suffix"),
        ([name.split("/")[1] for name in KARPATHY], "file name without folder and suffix"),
        ([str(n) for n in range(100, 120)], "number"),
        ([f"{n:012d}" for n in range(100, 120)], "number"),
        ([f"coco_val2014_{n:012d}" for n in range(100, 120)], "number"),
    ],
)
def test_captions_of_coco_meet_features_under_any_usual_name(stored: list[str], form: str) -> None:
    found = match(KARPATHY, stored[::-1])
    assert (found.form, found.names) == (form, dict(zip(KARPATHY, stored, strict=True)))
    assert found.told(KARPATHY, stored, "s").startswith("20 of 20 images are in s")


def test_shard_and_key_meet_the_key() -> None:
    wanted = [f"{shard:05}/{shard:05}{n:04}" for shard in range(3) for n in range(5)]
    assert match(wanted, [name.split("/")[1] for name in wanted]).form == "file name without folder and suffix"


@pytest.mark.parametrize("parts", ["{}.input", "shard-3/{}.left.rgb", "{}.image"])
def test_keys_of_webdataset_end_at_the_first_dot(parts: str) -> None:
    wanted = [f"sample{n:08}" for n in range(9)]
    found = match(wanted, [parts.format(name) for name in wanted])
    assert (found.form, len(found.names)) == ("file name up to its first dot", 9)
    both = [f"{name}.{side}" for name in wanted for side in ("left", "right")]
    assert match(wanted, both).names == {}, "two images of one key"


def test_names_that_two_images_share_are_matched_to_neither() -> None:
    found = match(["a/1", "b/1", "a/2", "a/3"], ["1", "2", "3"])
    assert found.names == {"a/2": "2", "a/3": "3"}
    assert found.told(["a/1", "b/1", "a/2", "a/3"], ["1", "2", "3"], "s") == (
        "2 of 4 images are in s by their file name without folder and suffix; not 'a/1' (the store has '1' and others)"
    )


def test_a_few_ids_in_a_looser_form_are_chance() -> None:
    wanted, stored = [f"x/{n}" for n in range(100)], [f"y/{n}" for n in range(90, 190)]
    assert match(wanted, stored).names == {}


def test_a_pattern_makes_an_id_of_its_parts() -> None:
    assert renamer("{number}")("val2014/COCO_val2014_000000391895") == "391895"
    assert renamer("val2014/COCO_val2014_{number:012d}")("391895") == "val2014/COCO_val2014_000000391895"
    assert renamer("{folder}-{stem}")("a/b.jpg") == "a-b"
    assert renamer("vg/{id}")("1") == "vg/1"
    with pytest.raises(ValueError, match="id 'a/b' has no number for --ids"):
        renamer("{number}")("a/b")


@pytest.mark.parametrize("pattern", ["x", "{other}", "{number:s}", "{", "{id.__class__}", "{}", "{id[0]}"])
def test_a_pattern_of_other_parts_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"--ids .* cannot be filled in"):
        renamer(pattern)
