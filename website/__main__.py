"""`python -m website [OUTPUT]`: build the site; any warning of the build ends it with exit code 1."""

import logging
import sys
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from website.pages import ROOT, lay, navigation, slug
from website.reference import reference_pages


def main(output: Path) -> None:
    """Lay the pages into build/pages, then render them to ``output``."""
    reference, pages = reference_pages(), ROOT / "build" / "pages"
    lay(pages, {f"docs/{path}": text for path, (_, text) in reference.items()})
    lay_style(pages)
    logging.getLogger("mkdocs").addHandler(logging.StreamHandler())
    form = str(Path(__file__).with_name("mkdocs.yml"))
    config = load_config(form, docs_dir=str(pages), site_dir=str(output.resolve()), nav=navigation(reference), strict=True)
    config.mdx_configs["toc"]["slugify"] = slug
    build(config)
    print(f"{output / 'index.html'}: written")


def lay_style(pages: Path) -> None:
    (pages / "style.css").write_text(Path(__file__).with_name("style.css").read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site"))
    except Abort:
        sys.exit("the site was not built: see the warnings above")
