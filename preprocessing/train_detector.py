"""``python -m preprocessing.train_detector``: another name of `megainter detector train`, from before there was that verb."""

import sys

from megainter.cli import main

if __name__ == "__main__":
    main(["detector", "train", *sys.argv[1:]])
