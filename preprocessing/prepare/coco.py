"""COCO's splits by what they mean: which of its images' folders a split's name tells, and which split for training that is."""

import re

PARTS = {"minival": "val", "valminusminival": "val", "nominival": "val", "minitrain": "train"}  # of detection papers: some of a folder's
PHASES = "dev|challenge|standard|std|reserve"  # of test
SUBSET = re.compile(rf"(?<![a-z])(train|val|test|{'|'.join(PARTS)})(?:[-_]?(?:{PHASES}))?[-_]?(20\d\d)(?!\d)")


def images_of(name: str) -> str:
    """The folder of images, such as "test2015", that a subset's or a file's name tells: of "test-dev2015" those of test; "" for none."""
    found = SUBSET.search(name)
    return f"{PARTS.get(found[1], found[1])}{found[2]}" if found else ""


def split_of(name: str) -> str:
    """train, val or test by the same; "" where the name tells none."""
    return images_of(name)[:-4]
