"""Scores of captions against images, of every pair or of chosen ones, chunk by chunk, by one or several processes.

The work is cut into chunks of a few images against all their captions. The cut depends on the data and on ``batch_pairs`` alone, and on CPU
every process computes with one thread, so that the scores are bit-equal whoever computes them and however many share the work.
"""

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from megainter.data.feature_store import FeatureStore
from megainter.errors import MegainterError, UsageError
from megainter.model.grid import EmbeddedRows, embed_captions, embed_images, score_grid, score_pairs
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.gallery import Tokens, region_rows

IMAGES_PER_CHUNK = 8  # a caption's embedding is shared by so many images; few, so that chunks can be shared out evenly
Model = TypeVar("Model", bound=PreTrainedModel)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DEAD = (
    "a scoring process ended without a word (out of memory?): give fewer --processes or a smaller --batch-pairs; "
    "the same command goes on where it stopped"
)


class Scorer(Protocol):
    """A model on a device."""

    def score(self, chunk: int) -> NDArray[np.float32]:
        """The scores of one chunk."""


class Work(Protocol):
    """Whatever can be scored chunk by chunk; sent to every process."""

    def scorer(self, device: torch.device) -> Scorer:
        """Its model on a device."""


@dataclass(frozen=True)
class Job:
    """Everything a process needs to score any chunk. ``image_order`` and ``caption_order`` sort by length, against padding."""

    model: Path
    store: FeatureStore
    image_ids: list[str]
    tokens: Tokens
    image_order: NDArray[np.int64]
    caption_order: NDArray[np.int64]
    max_regions: int
    batch_pairs: int
    precision: str

    def __len__(self) -> int:
        return -(-len(self.image_ids) // self.images_per_chunk)

    @property
    def images_per_chunk(self) -> int:
        return min(IMAGES_PER_CHUNK, self.batch_pairs)

    def images(self, chunk: int) -> NDArray[np.int64]:
        """Numbers of the images of a chunk."""
        return self.image_order[chunk * self.images_per_chunk : (chunk + 1) * self.images_per_chunk]

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Rows of a chunk's scores in the matrix [I, C] of all."""
        return self.images(chunk)

    def pair(self, chunk: int, row: int, column: int) -> tuple[int, int]:
        """Numbers of the image and the caption of a chunk's score."""
        return int(self.images(chunk)[row]), column

    def pairs(self, chunk: int) -> int:
        """How many pairs a chunk has."""
        return len(self.images(chunk)) * len(self.caption_order)

    def captions(self) -> Iterator[NDArray[np.int64]]:
        """Numbers of the captions of each forward."""
        size = max(1, self.batch_pairs // self.images_per_chunk)
        for start in range(0, len(self.caption_order), size):
            yield self.caption_order[start : start + size]

    def scorer(self, device: torch.device) -> "ChunkScorer":
        return ChunkScorer(self, device)


@dataclass(frozen=True)
class CandidateJob:
    """The same chunks of images, and of their pairs the chosen ones. ``keys`` int64 [P]: image * C + caption, ascending."""

    job: Job
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.job)

    @property
    def batch_pairs(self) -> int:
        return self.job.batch_pairs

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Rows of a chunk's scores in the column [P, 1] of all: its images' pairs, image by image."""
        captions = len(self.job.caption_order)
        images = self.job.images(chunk)
        begins, ends = np.searchsorted(self.keys, images * captions), np.searchsorted(self.keys, (images + 1) * captions)
        return np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])

    def pair(self, chunk: int, row: int, column: int) -> tuple[int, int]:
        """Numbers of the image and the caption of a chunk's score."""
        image, caption = divmod(int(self.keys[self.places(chunk)[row]]), len(self.job.caption_order))
        return image, caption

    def pairs(self, chunk: int) -> int:
        """How many pairs a chunk has."""
        return len(self.places(chunk))

    def scorer(self, device: torch.device) -> "CandidateScorer":
        return CandidateScorer(self, device)


def make_job(
    model: Path, store: FeatureStore, image_ids: list[str], tokens: Tokens, max_regions: int, batch_pairs: int, precision: str
) -> Job:
    """Sort images by region count and captions by length (stable), so that a forward has hardly any padding."""
    counts = store.region_counts(image_ids).clip(max=max_regions)
    image_order, caption_order = (np.argsort(lengths, kind="stable") for lengths in (counts, tokens.lengths))
    return Job(model, store, image_ids, tokens, image_order, caption_order, max_regions, batch_pairs, precision)


class ChunkScorer:
    """The model on one device, and the chunks it scores."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.model = load_model(job.model, InterBertForRetrieval)
        # nn.Module's own method: the wrapper around it in transformers has no usable type
        torch.nn.Module.to(self.model, device=device, dtype=DTYPES[job.precision])

    @torch.inference_mode()
    def score(self, chunk: int) -> NDArray[np.float32]:
        """Log-odds [images of the chunk, C], captions in their own order. Every image is read and embedded once."""
        job = self.job
        images = self._embed_images([job.image_ids[number] for number in job.images(chunk)])
        scores = np.empty((len(images.lengths), len(job.caption_order)), dtype=np.float32)
        for numbers in job.captions():
            ids, lengths = job.tokens.take(numbers)
            captions = embed_captions(self.model, ids.to(self.device), lengths)
            scores[:, numbers] = score_grid(self.model, captions, images).cpu().numpy()
        return scores

    @torch.inference_mode()
    def score_some(self, chunk: int, images_S: NDArray[np.int64], captions_S: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-odds [S] of some pairs of a chunk: places of images in the chunk, and numbers of captions.

        Captions of similar length meet in a forward, of as many pairs as a forward of all pairs has; all pairs give the bits of ``score``.
        """
        job = self.job
        images = self._embed_images([job.image_ids[number] for number in job.images(chunk)])
        place_of_caption = np.empty_like(job.caption_order)
        place_of_caption[job.caption_order] = np.arange(len(job.caption_order))
        order = np.lexsort((images_S, place_of_caption[captions_S]))
        width = max(1, job.batch_pairs // job.images_per_chunk) * len(images.lengths)
        scores = np.empty(len(order), dtype=np.float32)
        for start in range(0, len(order), width):
            some = order[start : start + width]
            some = some[np.lexsort((place_of_caption[captions_S[some]], images_S[some]))]
            distinct, caption_S = np.unique(place_of_caption[captions_S[some]], return_inverse=True)
            ids, lengths = job.tokens.take(job.caption_order[distinct])
            captions = embed_captions(self.model, ids.to(self.device), lengths)
            found = score_pairs(self.model, captions, images, torch.from_numpy(caption_S), torch.from_numpy(images_S[some]))
            scores[some] = found.cpu().numpy()
        return scores

    def _embed_images(self, image_ids: list[str]) -> EmbeddedRows:
        features, locations, lengths = region_rows([self.job.store[image_id] for image_id in image_ids], self.job.max_regions)
        return embed_images(self.model, features.to(self.device), locations.to(self.device), lengths)


class CandidateScorer:
    """The model on one device, and the chosen pairs it scores."""

    def __init__(self, work: CandidateJob, device: torch.device) -> None:
        self.work, self.scorer = work, ChunkScorer(work.job, device)

    def score(self, chunk: int) -> NDArray[np.float32]:
        """Log-odds [pairs of the chunk, 1], in the order of ``places``."""
        images, captions = np.divmod(self.work.keys[self.work.places(chunk)], len(self.work.job.caption_order))
        numbers = self.work.job.images(chunk)
        place = {int(number): i for i, number in enumerate(numbers)}
        places = np.array([place[int(number)] for number in images], dtype=np.int64)
        return self.scorer.score_some(chunk, places, captions)[:, None]


def load_model(folder: Path, kind: type[Model]) -> Model:
    """The model of this ``kind`` in a Hugging Face folder, in evaluation mode, from safetensors alone.

    ``UsageError`` where the folder is none, or its weights lack a part of the model (a bare encoder has no head).
    """
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = kind.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from None
    model, info = loaded
    missing: list[str] = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{folder} has no weights for {len(missing)} parameters, first {missing[0]}; give a pretrained or fine-tuned model"
        )
    whole: Model = model.eval()
    return whole


def score_chunks(job: Work, chunks: list[int], devices: list[torch.device]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(chunk, its scores) as they come, in no particular order. One device: in this process; several: a process for each."""
    if not chunks:
        return
    if len(devices) == 1:
        yield from _score_here(job, chunks, devices[0])
    else:
        yield from _score_in_processes(job, chunks, devices[: len(chunks)])


def _score_here(job: Work, chunks: list[int], device: torch.device) -> Iterator[tuple[int, NDArray[np.float32]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scorer = job.scorer(device)
        for chunk in chunks:
            yield chunk, scorer.score(chunk)
    finally:
        torch.set_num_threads(threads)


def _score_in_processes(job: Work, chunks: list[int], devices: list[torch.device]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks and CUDA state
    processes, pipes = [], []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(job, device, theirs), daemon=True)
            process.start()
            theirs.close()  # so that reading ends when the process does
            processes.append(process)
            pipes.append(ours)
        yield from _share_out(chunks, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _share_out(chunks: list[int], pipes: list[Connection]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Hand each process its next chunk when it has returned the one before."""
    waiting = iter(chunks)
    busy: dict[Connection, int] = {}
    for pipe in pipes:
        _hand_out(pipe, waiting, busy)
    while busy:
        pipe, scores = _next_result(list(busy))
        finished = busy.pop(pipe)
        _hand_out(pipe, waiting, busy)
        yield finished, scores


def _hand_out(pipe: Connection, waiting: Iterator[int], busy: dict[Connection, int]) -> None:
    chunk = next(waiting, None)
    if chunk is None:
        return
    try:
        pipe.send(chunk)
    except OSError:
        raise MegainterError(_DEAD) from None
    busy[pipe] = chunk


def _next_result(pipes: list[Connection]) -> tuple[Connection, NDArray[np.float32]]:
    pipe = wait(pipes)[0]
    assert isinstance(pipe, Connection)
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        raise MegainterError(_DEAD) from None
    if isinstance(result, BaseException):
        raise result
    return pipe, result


def _serve(job: Work, device: torch.device, pipe: Connection) -> None:
    """One scoring process: chunk numbers in, scores out, until the pipe closes (also because the other end was killed)."""
    torch.set_num_threads(1)
    try:
        scorer = None
        while True:
            chunk = pipe.recv()
            scorer = scorer or job.scorer(device)
            pipe.send(scorer.score(chunk))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except MegainterError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"in scoring process {os.getpid()}:\n{traceback.format_exc()}"))
