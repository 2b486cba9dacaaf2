"""Words of Chinese text, by jieba: Chinese is written without spaces, and BERT's vocabulary knows its characters alone."""

import importlib
import logging
import re
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megainter.errors import UsageError

WordSegmentation = Literal["auto", "wordpiece", "jieba"]
WORDPIECE = "wordpiece"  # words as the vocabulary has them: an entry that begins with "##" continues one
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")

_SAME_CHARACTERS = r"[\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{2fa1f}]"  # as arrow writes them
_CHINESE_SHARE = 0.01  # of the captions; fewer are names and signs within another language
_LOG = logging.getLogger("megainter")


def segmentation(setting: WordSegmentation, captions: pa.ChunkedArray, share: float | None = None) -> str:
    """What tells the words of ``captions`` apart: ``WORDPIECE``, or jieba with its version, on which the words depend.

    "auto" is jieba where at least one caption in a hundred has Chinese; ``share`` is how many have, where that is known. ``UsageError``
    where jieba is needed and not installed.
    """
    if setting == "wordpiece":
        return WORDPIECE
    if setting == "jieba":
        share = 1.0
    elif share is None:
        share = count_chinese(captions) / max(len(captions), 1)
    if 0 < share < _CHINESE_SHARE:
        _LOG.info("%.2g %% of the captions have Chinese: its characters count as words (data.word_segmentation)", 100 * share)
    if share < _CHINESE_SHARE:
        return WORDPIECE
    jieba = _jieba(
        "whole words of Chinese captions are masked: pip install 'megainter[chinese]' tells them apart, "
        "or --data.word_segmentation wordpiece takes every character for a word"
    )
    return f"jieba {jieba.__version__}"


def count_chinese(captions: pa.ChunkedArray) -> int:
    """How many captions have Chinese."""
    return pc.sum(pc.match_substring_regex(captions, _SAME_CHARACTERS)).as_py() or 0


def chinese_segmenter() -> Callable[[str], list[str]]:
    """jieba's cut: a text as its words, which joined are the text again. ``UsageError`` where it is not installed.

    Its dictionary is built in memory, since the cache it would share in the temporary folder is open to everybody.
    """
    jieba = _jieba("Chinese captions are segmented with jieba: pip install 'megainter[chinese]'")
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    cut: Callable[[str], list[str]] = segmenter.lcut
    return cut


def _jieba(needed: str) -> Any:
    try:
        return importlib.import_module("jieba")
    except ModuleNotFoundError:
        raise UsageError(needed) from None


def word_begins(text: str, cut: Callable[[str], list[str]]) -> NDArray[np.int32]:
    """For each character of ``text`` where its word begins, int32 [len(text)]: in words with Chinese; elsewhere its own place."""
    begins = np.arange(len(text), dtype=np.int32)
    if CHINESE.search(text):
        place = 0
        for word in cut(text):
            if CHINESE.search(word):
                begins[place : place + len(word)] = place
            place += len(word)
    return begins
