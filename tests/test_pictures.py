"""The first run's pictures are made by its commands, on a small demo."""

from pathlib import Path

import pytest
from PIL import Image

from tests.browser import MARKS
from tests.pictures import MOST_BYTES, PICTURES, SCALE, WIDTH, make_pictures, query
from tests.test_readme import demo_run, workplace

pytestmark = MARKS
__all__ = ["demo_run", "workplace"]  # fixtures


@pytest.mark.usefixtures("demo_run")
def test_every_picture_of_the_first_run_is_made_by_its_commands(workplace: Path, tmp_path: Path) -> None:
    assert len(query().split()) > 3, "a sentence is typed"
    made = list(make_pictures(workplace, tmp_path))
    assert [picture.name for picture in made] == list(PICTURES)
    for picture in made:
        with Image.open(picture) as image:
            assert image.format == "WEBP"
            assert image.width == WIDTH * SCALE
            assert 400 < image.height < 2500
            assert len(image.getcolors(image.width * image.height) or []) > 100, "more than an empty page"
        assert picture.stat().st_size <= MOST_BYTES
