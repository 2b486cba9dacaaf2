"""Every stored form of a picture gives the pixels it should, and every file that is none gives its reason."""

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megainter.errors import UsageError
from preprocessing.images.decode import MAX_PIXELS, UnreadableImageError, confined, find_images, formats, image_size, load_image

MORE = find_spec("pillow_heif") is not None
SCAN = "truncated" if MORE else "TIFF, and reading it needs pip install 'megainter\\[images\\]'"
needs_extra = pytest.mark.skipif(not MORE, reason="the extra images (pillow-heif) is not installed")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def corners() -> Image.Image:
    """6 x 4: red top left, green top right, blue bottom left, white elsewhere."""
    image = Image.new("RGB", (6, 4), WHITE)
    for at, colour in {(0, 0): RED, (5, 0): GREEN, (0, 3): BLUE}.items():
        image.putpixel(at, colour)
    return image


# where the stored top left, top right, bottom left corners belong, by EXIF orientation: (row, column) as 0 = first, -1 = last
SHOWN = {
    1: [(0, 0), (0, -1), (-1, 0)],
    2: [(0, -1), (0, 0), (-1, -1)],
    3: [(-1, -1), (-1, 0), (0, -1)],
    4: [(-1, 0), (-1, -1), (0, 0)],
    5: [(0, 0), (-1, 0), (0, -1)],
    6: [(0, -1), (-1, -1), (0, 0)],
    7: [(-1, -1), (0, -1), (-1, 0)],
    8: [(-1, 0), (0, 0), (-1, -1)],
}


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation_is_applied_and_the_size_from_the_header_agrees(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", corners(), exif=exif, lossless=True)
    shown = pixels(path)
    assert [tuple(shown[at].tolist()) for at in SHOWN[orientation]] == [RED, GREEN, BLUE]
    assert image_size(path) == (shown.shape[1], shown.shape[0]) == ((4, 6) if orientation > 4 else (6, 4))


@needs_extra
@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_scan_is_shown_upright_and_its_size_from_the_header_agrees(tmp_path: Path, orientation: int, compression: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.tif", corners(), exif=exif, compression=compression)
    shown = pixels(path)
    assert [tuple(shown[at].tolist()) for at in SHOWN[orientation]] == [RED, GREEN, BLUE]
    assert image_size(path) == (shown.shape[1], shown.shape[0]) == ((4, 6) if orientation > 4 else (6, 4))


@needs_extra
@pytest.mark.parametrize("suffix", ["heic", "heif", "HEIC"])
def test_a_phone_s_photo_has_the_pixels_of_the_png_of_the_same_picture(tmp_path: Path, suffix: str) -> None:
    blocks = np.kron(np.random.default_rng(0).integers(40, 216, (4, 6, 3), np.uint8), np.ones((32, 32, 1), np.uint8))
    formats()  # which registers the writer as well
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(blocks), format="HEIF", quality=95)
    assert image_size(path) == (192, 128)
    np.testing.assert_allclose(pixels(path).astype(int), blocks, atol=24)
    assert np.abs(pixels(path).astype(int) - blocks).mean() < 4
    small = load_image(path, draft=True)
    assert small.size == (192, 128)
    assert find_images(tmp_path) == [("a", path.name)]


@needs_extra
def test_scans_of_every_depth_become_rgb(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 40000, 65535]], np.uint16)
    assert pixels(saved(tmp_path / "a.tif", Image.fromarray(grey)))[0].tolist() == [[v] * 3 for v in (0, 1, 156, 255)]
    assert pixels(saved(tmp_path / "b.tif", Image.new("1", (9, 9), 1), compression="group4"))[0, 0].tolist() == list(WHITE)
    cmyk = pixels(saved(tmp_path / "c.tif", Image.new("CMYK", (16, 16), (255, 0, 0, 0))))
    np.testing.assert_allclose(cmyk[8, 8], (0, 255, 255), atol=3)
    pages = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED)]
    assert pixels(saved(tmp_path / "d.tif", pages[0], save_all=True, append_images=pages[1:]))[0, 0].tolist() == list(GREEN)
    with pytest.raises(UnreadableImageError, match="more than 100 megapixels"):
        load_image(saved(tmp_path / "e.tif", Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)), compression="group4"))


HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.heic", HEIC_HEAD, "HEIC"),
        ("b.jpg", HEIC_HEAD, "HEIC"),
        ("c.tif", b"II*\0" + bytes(40), "TIFF"),
        ("d.tiff", b"MM\0*" + bytes(40), "TIFF"),
    ],
)
def test_without_the_extra_phones_and_scanners_are_told_what_reads_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.cache_clear()
    (tmp_path / name).write_bytes(content)
    try:
        with pytest.raises(UnreadableImageError) as error:
            load_image(tmp_path / name)
        assert error.value.reason == f"{kind}, and reading it needs pip install 'megainter[images]'"
    finally:
        formats.cache_clear()


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 40000, 65535]], np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    assert pixels(path)[0].tolist() == [[v] * 3 for v in (0, 1, 156, 255)]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    layer = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(layer))
    assert pixels(path)[0].tolist() == [[255, 255, 255], [255, 0, 0], [127, 127, 127]]
    assert pixels(saved(tmp_path / "b.png", Image.new("RGB", (2, 1), RED), transparency=RED))[0, 0].tolist() == list(WHITE)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([*BLUE, *GREEN])
    assert pixels(saved(tmp_path / "c.png", palette, transparency=1))[0, 0].tolist() == list(WHITE)
    assert pixels(saved(tmp_path / "d.png", Image.new("LA", (1, 1), (0, 0))))[0, 0].tolist() == list(WHITE)


def test_palette_grey_bilevel_and_cmyk_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([*BLUE, *GREEN])
    assert pixels(saved(tmp_path / "a.png", palette))[0, 0].tolist() == list(GREEN)
    assert pixels(saved(tmp_path / "b.png", Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77] * 3
    assert pixels(saved(tmp_path / "c.bmp", Image.new("1", (1, 1), 1)))[0, 0].tolist() == list(WHITE)
    cmyk = pixels(saved(tmp_path / "d.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100))
    np.testing.assert_allclose(cmyk[8, 8], (0, 255, 255), atol=3)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED, BLUE)]
    for name in ("a.gif", "a.webp"):
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert pixels(path)[0, 0].tolist() == list(GREEN)


def test_a_large_jpeg_is_decoded_smaller_only_when_asked(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (5000, 4000), (10, 120, 200)))
    assert load_image(path).size == image_size(path) == (5000, 4000)
    small = load_image(path, draft=True)
    assert small.size == (2500, 2000)
    np.testing.assert_allclose(np.asarray(small)[1000, 1000], (10, 120, 200), atol=3)
    medium = saved(tmp_path / "b.jpg", Image.new("RGB", (4000, 3000)))
    assert load_image(medium, draft=True).size == (4000, 3000)


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> reason."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = saved(folder / "whole.jpg", Image.fromarray(noise)).read_bytes()
    png = saved(folder / "whole.png", Image.fromarray(noise)).read_bytes()
    contents = {
        "html.jpg": (b"<html>404</html>", "not JPEG, PNG, WEBP, GIF"),
        "empty.jpg": (b"", "empty file"),
        "half.jpg": (whole[: len(whole) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated|broken"),
        "header.png": (png[:30], "not JPEG|truncated"),
        "flipped.png": (png[:100] + bytes(200) + png[300:], "."),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not JPEG"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    scan = saved(folder / "scan.tif", Image.fromarray(noise))
    scan.write_bytes(scan.read_bytes()[: scan.stat().st_size // 2])  # the directory stands in front of the pixels
    saved(folder / "bomb.png", Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)))
    saved(folder / "larger-bomb.png", Image.new("1", (20_000, 20_000)))
    special = {"folder.jpg": "not a regular file", "pipe.jpg": "not a regular file", "scan.tif": SCAN, "absent.jpg": "no such file"}
    bombs = {"bomb.png": "more than 100 megapixels", "larger-bomb.png": "more than 100 megapixels"}
    return {name: reason for name, (_, reason) in contents.items()} | special | bombs


def test_unreadable_files_have_a_one_line_reason(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(UnreadableImageError, match=f"{name} is not a readable image: .*({reason})") as caught:
                load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, UsageError)
    load_image(tmp_path / "whole.jpg")


def test_ids_are_paths_without_suffix_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.jpeg", "c.d.webp", ".hidden.jpg", ".git/x.jpg", "notes.txt", "scan.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_images(tmp_path) == [("a", "a.jpeg"), ("b/1", "b/1.png"), ("b/2", "b/2.JPG"), ("c.d", "c.d.webp"), ("scan", "scan.tiff")]


def test_folders_are_walked_through_links_but_not_round_in_circles(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    photos.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").write_bytes(b"x")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "again").symlink_to(photos)
    assert find_images(photos) == [("linked/a", "linked/a.jpg")]


def test_two_files_with_one_id_are_both_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"a\.jpg and a\.png would both have the image id 'a'"):
        find_images(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_images(tmp_path / "absent")
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds no images"):
        find_images(tmp_path)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "link.jpg", "a/../../secret.jpg", "nul\0.jpg"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "images").mkdir()
    saved(tmp_path / "secret.jpg", Image.new("RGB", (4, 4)))
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UnreadableImageError, match="outside the images folder"):
        confined(tmp_path / "images", path)
