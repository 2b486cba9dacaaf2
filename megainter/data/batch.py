"""Packed micro-batches of the deterministic stream: every rank's share of every global step, and their background loading."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megainter.data.feature_store import FeatureStore
from megainter.data.loader import StepLoader, make_loader
from megainter.data.manifest import Pairs
from megainter.data.masking import VocabularyFacts
from megainter.data.negatives import HardNegatives
from megainter.data.order import Int64s
from megainter.data.portions import accumulation, forwards, shares
from megainter.data.sampling import Draws, Sample, Sampler, StreamSettings, drop_missing
from megainter.data.text import TokenTable
from megainter.errors import UsageError
from megainter.model.packing import PackedInputs

__all__ = [
    "PretrainBatch",
    "PretrainStream",
    "StepLoader",
    "StreamSettings",
    "ValidationBatches",
    "collate",
    "combined_digest",
    "drop_missing",
    "make_loader",
    "validation_batches",
]


@dataclass(frozen=True)
class PretrainBatch:
    """One micro-batch. M masked tokens and K scored masked regions, of S samples; positions are rows of the packed tensors.

    ``msm_positions``, ``msm_labels`` int64 [M] (labels are the original ids); ``mrm_positions`` int64 [K]; ``mrm_targets`` float32 [K, C],
    the detector's class probabilities with background first, or [K, F] the unmasked features for the "feature" objective; ``itm_labels``
    int64 [S], 0 = matched. ``counted`` False marks a filler: run so that all ranks run as many forwards, and left out of every count.
    """

    inputs: PackedInputs
    msm_positions: torch.Tensor
    msm_labels: torch.Tensor
    mrm_positions: torch.Tensor
    mrm_targets: torch.Tensor
    itm_labels: torch.Tensor
    counted: bool = True

    def counts(self) -> tuple[int, int, int]:
        """(masked tokens, scored masked regions, samples): what the three losses are divided by, summed over the global batch."""
        return (len(self.msm_positions), len(self.mrm_positions), len(self.itm_labels)) if self.counted else (0, 0, 0)

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "PretrainBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, inputs=self.inputs.to(device), **moved)

    def pin_memory(self) -> "PretrainBatch":
        """The same batch in page-locked memory (called by the loader); lengths stay as they are, they never leave the CPU."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, inputs=self.inputs.pin_memory(), **pinned)


_TENSORS = ("msm_positions", "msm_labels", "mrm_positions", "mrm_targets", "itm_labels")


def collate(samples: Sequence[Sample], settings: StreamSettings, counted: bool = True) -> PretrainBatch:
    """Lay samples end to end as one micro-batch; regions of each sample follow its global region."""
    regions = np.array([len(sample.masked) + 1 for sample in samples], dtype=np.int64)
    starts = np.cumsum(regions) - regions
    is_region = np.ones(int(regions.sum()), dtype=bool)
    is_region[starts] = False
    rows = np.flatnonzero(is_region)  # packed rows of the detector's regions, the global regions left out
    ids, msm_positions, msm_labels, text_lengths = _texts(samples, settings.gate_msm)
    scored = np.concatenate([sample.masked if sample.itm_label == 0 else np.zeros_like(sample.masked) for sample in samples])
    inputs = PackedInputs(
        input_ids=torch.from_numpy(ids),
        token_type_ids=torch.zeros(len(ids), dtype=torch.int64),
        text_lengths=torch.from_numpy(text_lengths),
        region_features=_features(samples, starts, rows),
        region_locations=torch.from_numpy(_locations(samples, starts, rows, regions - 1)),
        region_lengths=torch.from_numpy(regions),
    )
    return PretrainBatch(
        inputs=inputs,
        msm_positions=torch.from_numpy(msm_positions),
        msm_labels=torch.from_numpy(msm_labels),
        mrm_positions=torch.from_numpy(rows[scored]),
        mrm_targets=torch.from_numpy(_targets(samples, settings.region_objective)),
        itm_labels=torch.tensor([sample.itm_label for sample in samples], dtype=torch.int64),
        counted=counted,
    )


def _texts(samples: Sequence[Sample], gate_msm: bool) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Packed ids, masked positions among them, labels, and text lengths."""
    lengths = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    scored = [(start, sample) for start, sample in zip(starts, samples, strict=True) if not (gate_msm and sample.itm_label)]
    none = np.zeros(0, dtype=np.int64)
    positions = np.concatenate([none, *(start + sample.msm_positions for start, sample in scored)])
    labels = np.concatenate([none, *(sample.msm_labels for _, sample in scored)])
    return np.concatenate([sample.ids for sample in samples]), positions, labels, lengths


def _features(samples: Sequence[Sample], starts: Int64s, rows: Int64s) -> torch.Tensor:
    """float16 [Nr, F]: masked regions are zero, and the global region is the mean over all of them after masking (official code)."""
    size = samples[0].features.shape[1]
    packed = np.empty((len(rows) + len(samples), size), dtype=np.float16)
    blank = np.zeros((1, size), dtype=np.float16)
    np.concatenate([part for sample in samples for part in (blank, sample.features)], out=packed)
    packed[rows[np.concatenate([sample.zeroed for sample in samples])]] = 0
    features = torch.from_numpy(packed)  # torch sums half precision several times faster than numpy
    for start, sample in zip(starts.tolist(), samples, strict=True):
        count = len(sample.masked)
        if count:
            features[start] = features[start + 1 : start + 1 + count].sum(0, dtype=torch.float32) / count
    return features


def _locations(samples: Sequence[Sample], starts: Int64s, rows: Int64s, counts: Int64s) -> NDArray[np.float32]:
    """float32 [Nr, 5]: x1/W, y1/H, x2/W, y2/H, share of the area; [0, 0, 1, 1, 1] for global regions."""
    sizes = np.array([(sample.width, sample.height) for sample in samples], dtype=np.float32)
    boxes = np.concatenate([sample.boxes for sample in samples]) / np.tile(np.repeat(sizes, counts, axis=0), 2)
    locations = np.empty((len(rows) + len(samples), 5), dtype=np.float32)
    locations[starts] = (0, 0, 1, 1, 1)
    locations[rows, :4] = boxes
    locations[rows, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return locations


def _targets(samples: Sequence[Sample], objective: str) -> NDArray[np.float32]:
    """float32 [K, C] or [K, F]: what the masked regions of matched pairs were."""
    if objective == "class":
        return np.concatenate([sample.class_probs for sample in samples])
    none = np.zeros((0, samples[0].features.shape[1]), dtype=np.float32)
    return np.concatenate([none, *(sample.features[sample.masked] for sample in samples if sample.itm_label == 0)], dtype=np.float32)


class PretrainStream(Dataset[list[PretrainBatch]]):
    """``stream[step]``: the micro-batches of this rank at that global step (from 0). Endless, and a pure function of its arguments.

    Global step s takes samples ``s * global_batch ..`` of the endless sequence epoch 0, epoch 1, ...; every epoch shows each caption once,
    and a step may cross into the next epoch. What the samples are does not depend on rank or world size, only who gets them does.
    """

    def __init__(
        self,
        pairs: Pairs,
        store: FeatureStore,
        tokens: TokenTable,
        vocabulary: VocabularyFacts,
        settings: StreamSettings,
        rank: int = 0,
        world_size: int = 1,
        hard_negatives: HardNegatives | None = None,
        by_storage: Int64s | None = None,
    ) -> None:
        self.sampler = Sampler(pairs, store, tokens, vocabulary, settings, hard_negatives, by_storage)
        self.settings, self.rank, self.world_size = settings, rank, world_size
        self.accumulation_steps = accumulation(settings, world_size, lambda step: self.sampler.lengths(self.draws(step)))

    @property
    def size(self) -> int:
        """Samples of an epoch: one for each caption."""
        return len(self.sampler.pairs)

    def __getitem__(self, step: int) -> list[PretrainBatch]:
        draws = self.draws(step)
        mine = self._shares(draws)[self.rank]
        self.sampler.announce(draws, np.concatenate(mine))
        return [self._batch(draws, share) for share in mine]

    def sample(self, epoch: int, n: int) -> Sample:
        """Sample ``n`` of ``epoch``, alone."""
        return self.sampler.sample(self.sampler.draws(np.array([epoch]), np.array([n])), 0)

    def draws(self, step: int) -> Draws:
        """All samples of a global step, in the order of the sequence, before masking."""
        sequence = step * self.settings.global_batch + np.arange(self.settings.global_batch, dtype=np.int64)
        return self.sampler.draws(sequence // self.size, sequence % self.size)

    def sample_digests(self, step: int) -> list[tuple[int, str]]:
        """(place in the global step, hex digest) of this rank's samples; all ranks' together give ``combined_digest``."""
        draws = self.draws(step)
        places = np.concatenate(self._shares(draws)[self.rank])
        return [(int(i), self.sampler.digest(self.sampler.sample(draws, int(i))).hex()) for i in places]

    def digest(self, step: int) -> str:
        """Hex SHA-256 of all samples of a global step, in the order of the sequence: the same at every world size."""
        draws = self.draws(step)
        return combined_digest([(i, self.sampler.digest(self.sampler.sample(draws, i)).hex()) for i in range(len(draws))])

    def _shares(self, draws: Draws) -> list[list[Int64s]]:
        return shares(self.settings, self.sampler.lengths(draws), self.world_size, self.accumulation_steps)

    def _batch(self, draws: Draws, share: Int64s) -> PretrainBatch:
        return collate(self.sampler.samples(draws, share), self.settings)


def combined_digest(digests: list[tuple[int, str]]) -> str:
    """The digest of a global step from the (place, digest) of its samples, gathered from all ranks in any order."""
    return hashlib.sha256("".join(digest for _, digest in sorted(digests)).encode()).hexdigest()


class ValidationBatches(Dataset[PretrainBatch]):
    """``batches[i]``: the i-th micro-batch of this rank over a fixed set, the first ``count`` samples of epoch 0.

    Every rank has ``len(batches)`` of them, and every sample is in exactly one that is counted. Build the stream with ``shuffle=False``
    for a set that does not depend on the seed's order.
    """

    def __init__(self, stream: PretrainStream, count: int) -> None:
        self.stream = stream
        self.count = min(count, stream.size)
        numbers = np.arange(self.count, dtype=np.int64)
        self._draws = stream.sampler.draws(np.zeros_like(numbers), numbers)
        lengths = stream.sampler.lengths(self._draws)
        self._forwards = forwards(stream.settings, lengths, stream.world_size)
        self._shares = _fixed_shares(stream, lengths, self._forwards)

    def __len__(self) -> int:
        return self._forwards

    def __getitem__(self, i: int) -> PretrainBatch:
        if not 0 <= i < self._forwards:
            raise IndexError(i)
        share = self._shares[i * self.stream.world_size + self.stream.rank]
        filler = len(share) == 0
        samples = self.stream.sampler.samples(self._draws, self._shares[0][:1] if filler else share)
        return collate(samples, self.stream.settings, counted=not filler)


def _fixed_shares(stream: PretrainStream, lengths: Int64s, turns: int) -> list[Int64s]:
    """The samples of each forward of each rank, those of a turn side by side; some are empty where samples are few."""
    if stream.settings.micro_tokens is None or len(lengths) < stream.world_size:
        return np.array_split(np.argsort(-lengths, kind="stable"), turns * stream.world_size)
    by_rank = shares(stream.settings, lengths, stream.world_size, turns)
    return [by_rank[rank][turn] for turn in range(turns) for rank in range(stream.world_size)]


def validation_batches(stream: PretrainStream, count: int) -> ValidationBatches:
    """The first ``count`` samples (or all there are) of ``stream`` at epoch 0, as micro-batches shared out over its ranks."""
    if count < 1:
        raise UsageError(f"validation needs at least one sample, got {count}")
    return ValidationBatches(stream, count)
