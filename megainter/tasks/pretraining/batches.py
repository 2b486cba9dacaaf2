"""Packed micro-batches of the deterministic stream: every rank's share of every global step."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs, packed_locations, packed_rows
from megainter.data.stream.masking import Bools
from megainter.data.stream.portions import forwards, shares
from megainter.data.stream.steps import GlobalSteps
from megainter.errors import UsageError
from megainter.tasks.pretraining.sampling import Draws, OwnCaptions, Sample, Sampler, Samples, StreamSettings
from megainter.tasks.pretraining.sides import Hidden, Sides


@dataclass(frozen=True)
class PretrainBatch:
    """One micro-batch. M masked tokens and K scored masked regions, of S samples; positions are rows of the packed tensors.

    ``msm_positions``, ``msm_labels`` int64 [M] (labels are the original ids); ``mrm_positions`` int64 [K]; ``mrm_targets`` float32 [K, C],
    the detector's class probabilities with background first, or [K, F] the unmasked features for the "feature" objective; ``itm_labels``
    int64 [S], 0 = matched. ``sides`` is what image-text contrast compares, where that is trained. ``counted`` False marks a filler: run
    so that all ranks run as many forwards, and left out of every count.
    """

    inputs: PackedInputs
    msm_positions: torch.Tensor
    msm_labels: torch.Tensor
    mrm_positions: torch.Tensor
    mrm_targets: torch.Tensor
    itm_labels: torch.Tensor
    counted: bool = True
    sides: Sides | None = None

    def counts(self) -> tuple[int, ...]:
        """(masked tokens, scored masked regions, samples), and with ``sides`` samples again: what the losses are divided by, summed over
        the global batch."""
        samples = len(self.itm_labels)
        counts = (len(self.msm_positions), len(self.mrm_positions), samples, *([samples] if self.sides is not None else []))
        return counts if self.counted else (0,) * len(counts)

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "PretrainBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        sides = self.sides.to(device) if self.sides is not None else None
        return replace(self, inputs=self.inputs.to(device), sides=sides, **moved)

    def pin_memory(self) -> "PretrainBatch":
        """The same batch in page-locked memory (called by the loader); lengths stay as they are, they never leave the CPU."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        sides = self.sides.pin_memory() if self.sides is not None else None
        return replace(self, inputs=self.inputs.pin_memory(), sides=sides, **pinned)


_TENSORS = ("msm_positions", "msm_labels", "mrm_positions", "mrm_targets", "itm_labels")


@dataclass(frozen=True)
class Contrasted:
    """What contrast sees of a micro-batch: the samples' own captions, which regions (bool [N], without the global ones), and the samples'
    places in the step, int64 [S]."""

    own: OwnCaptions
    kept: Bools
    places: Int64s

    def sides(self, samples: Samples, hidden: Hidden) -> Sides:
        """Both sides of ``samples``, where masking hid what ``hidden`` has."""
        return Sides.of(self.own, self.places, samples.draws, hidden, samples.regions.counts, self.kept)


def collate(samples: Samples, settings: StreamSettings, counted: bool = True, contrast: Contrasted | None = None) -> PretrainBatch:
    """Samples as one micro-batch, their features and class probabilities read; regions of each sample follow its global region.

    ``contrast``: what is compared besides, where contrast is trained.
    ``DamagedError`` for a record that is not as it was written.
    """
    counts = samples.regions.counts
    record = np.repeat(np.arange(len(counts)), counts)  # of each region
    rows = packed_rows(counts)
    spoken = _spoken(samples.msm_positions, samples.text_lengths, samples.draws, settings.gate_msm)
    hidden = Hidden(samples.regions.schema.feature_size) if contrast is not None else None
    features, predicted = _features(samples, settings.region_objective == "feature", hidden)
    inputs = PackedInputs(
        input_ids=torch.from_numpy(samples.ids),
        token_type_ids=torch.zeros(len(samples.ids), dtype=torch.int64),
        text_lengths=torch.from_numpy(samples.text_lengths),
        region_features=features,
        region_locations=torch.from_numpy(packed_locations(samples.regions)),
        region_lengths=torch.from_numpy(counts + 1),
    )
    return PretrainBatch(
        inputs=inputs,
        msm_positions=torch.from_numpy(samples.msm_positions[spoken]),
        msm_labels=torch.from_numpy(samples.msm_labels[spoken]),
        mrm_positions=torch.from_numpy(rows[samples.scored]),
        mrm_targets=_class_targets(samples, record) if settings.region_objective == "class" else torch.from_numpy(predicted),
        itm_labels=torch.from_numpy(samples.draws.itm_labels),
        counted=counted,
        sides=contrast.sides(samples, hidden) if contrast is not None and hidden is not None else None,
    )


def _spoken(positions: Int64s, text_lengths: Int64s, draws: Draws, gate_msm: bool) -> NDArray[np.bool_]:
    """bool [M]: which of the masked tokens are scored."""
    if not gate_msm:
        return np.ones(len(positions), np.bool_)
    sample = np.searchsorted(np.cumsum(text_lengths), positions, side="right")
    return draws.itm_labels[sample] == 0


def with_captions(batch: PretrainBatch, draws: Draws, sampler: Sampler) -> PretrainBatch:
    """The same micro-batch showing the captions of ``draws``, which are its samples but for these; masked as each would be alone."""
    ids, lengths, positions, labels = sampler.texts(draws)
    spoken = _spoken(positions, lengths, draws, sampler.settings.gate_msm)
    made = [ids, np.zeros_like(ids), positions[spoken], labels[spoken]]
    rows = [torch.from_numpy(array) for array in made]
    if batch.msm_labels.is_pinned():
        rows = [row.pin_memory() for row in rows]
    inputs = replace(batch.inputs, input_ids=rows[0], token_type_ids=rows[1], text_lengths=torch.from_numpy(lengths))
    return replace(batch, inputs=inputs, msm_positions=rows[2], msm_labels=rows[3])


def _features(samples: Samples, wanted: bool, hidden: Hidden | None = None) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """float16 [Nr, F]: masked regions are zero, and the global region is the mean over all of them after masking (official code).

    Where ``wanted`` also float32 [K, F], what the scored regions were; ``hidden`` takes what all masked ones were. A sample is read,
    blanked and summed while it is in the cache.
    """
    regions, size = samples.regions, samples.regions.schema.feature_size
    ends, numbers = np.cumsum(regions.counts), np.arange(len(samples))
    features, sums = torch.empty(len(samples.masked) + len(samples), size, dtype=torch.float16), torch.empty(len(samples), size)
    packed = features.numpy()
    parts = features.split([count for own in regions.counts.tolist() for count in (1, own)])[1::2]
    zeroed = np.flatnonzero(samples.zeroed)
    begins, cuts = (ends - regions.counts).tolist(), np.searchsorted(zeroed, np.append(0, ends)).tolist()
    predicted = [np.zeros((0, size), np.float32)]
    for i, (begin, part, total) in enumerate(zip(begins, parts, sums.unbind(), strict=True)):
        own = packed[begin + i + 1 : begin + i + 1 + len(part)]
        stored = regions.features(i, own)
        if wanted:
            predicted.append(stored[samples.scored[begin : begin + len(own)]].astype(np.float32))
        blanked = zeroed[cuts[i] : cuts[i + 1]] - begin
        if hidden is not None and len(blanked):
            hidden.keep(begin + i, blanked, part)
        own[blanked] = 0
        torch.sum(part, 0, dtype=torch.float32, out=total)  # several times as fast as NumPy's
    means = sums / torch.from_numpy(regions.counts.clip(min=1))[:, None]
    features[torch.from_numpy(ends - regions.counts + numbers)] = means.half()
    return features, np.concatenate(predicted)


def _class_targets(samples: Samples, record: Int64s) -> torch.Tensor:
    """float32 [K, C]: the class probabilities of the scored regions."""
    first = np.cumsum(samples.regions.counts) - samples.regions.counts
    scored = np.flatnonzero(samples.scored)
    of = record[scored]
    return torch.from_numpy(samples.regions.class_probs(of, scored - first[of])).float()  # from half precision exactly, and fast


class PretrainStream(Dataset[list[PretrainBatch]]):
    """``stream[step]``: the micro-batches of this rank at that global step (from 0). Endless, and a pure function of its arguments.

    Every epoch shows each caption once; the steps are ``GlobalSteps``.
    """

    def __init__(self, sampler: Sampler, rank: int = 0, world_size: int = 1) -> None:
        self.sampler, self.settings = sampler, sampler.settings
        self.steps = GlobalSteps(
            self.settings, len(sampler.pairs), lambda epochs, numbers: sampler.lengths(sampler.draws(epochs, numbers)), rank, world_size
        )

    @property
    def size(self) -> int:
        """Samples of an epoch: one for each caption."""
        return self.steps.size

    def __getitem__(self, step: int) -> list[PretrainBatch]:
        draws = self.draws(step)
        mine = self.steps.mine(self.sampler.lengths(draws))
        self.sampler.announce(draws, np.concatenate(mine))
        return [self.batch(draws, share) for share in mine]

    def places(self, step: int) -> list[Int64s]:
        """Places within the global step of the samples of each of this rank's micro-batches."""
        return self.steps.mine(self.sampler.lengths(self.draws(step)))

    def shown(self, step: int) -> list[str]:
        """Image id and caption of each of a global step's samples; which caption is drawn inside the step, the step alone knows."""
        draws, pairs = self.draws(step), self.sampler.pairs
        captions, drawn = pairs.captions(draws.caption_rows.tolist()), self.sampler.drawn_in_step(draws).tolist()
        told = ["(another caption of the step)" if other else caption for caption, other in zip(captions, drawn, strict=True)]
        return [f"{pairs.image_id(row)}: {text}" for row, text in zip(draws.rows.tolist(), told, strict=True)]

    def sample(self, epoch: int, n: int) -> Sample:
        """Sample ``n`` of ``epoch``, alone."""
        return self.sampler.sample(self.sampler.draws(np.array([epoch]), np.array([n])), 0)

    def draws(self, step: int) -> Draws:
        """All samples of a global step, in the order of the sequence, before masking."""
        return self.sampler.draws(*self.steps.samples(step))

    def sample_ids(self, step: int) -> list[str]:
        """Pair ids of a global step's samples; of a mismatched one also the pair whose caption it shows."""
        draws, name = self.draws(step), self.sampler.pairs.pair_id
        shown = zip(draws.rows.tolist(), draws.caption_rows.tolist(), self.sampler.drawn_in_step(draws).tolist(), strict=True)
        return [
            f"{name(row)} with another caption of the step" if drawn else name(row) if row == caption
            else f"{name(row)} with the caption of {name(caption)}" for row, caption, drawn in shown
        ]  # fmt: skip

    def sample_digests(self, step: int) -> list[tuple[int, str]]:
        """(place in the global step, hex digest) of this rank's samples; all ranks' together give ``combined_digest``."""
        draws = self.draws(step)
        places = np.concatenate(self.steps.mine(self.sampler.lengths(draws)))
        return [(int(i), self.sampler.digest(self.sampler.sample(draws, int(i))).hex()) for i in places]

    def digest(self, step: int) -> str:
        """Hex SHA-256 of all samples of a global step, in the order of the sequence: the same at every world size."""
        draws = self.draws(step)
        return combined_digest([(i, self.sampler.digest(self.sampler.sample(draws, i)).hex()) for i in range(len(draws))])

    def batch(self, draws: Draws, places: Int64s, counted: bool = True) -> PretrainBatch:
        """Samples ``places`` of ``draws`` as one micro-batch."""
        samples = self.sampler.samples(draws, places)
        if not self.settings.contrast:
            return collate(samples, self.settings, counted=counted)
        own, kept = self.sampler.own_captions(samples.draws), self.sampler.kept_regions(samples.draws, samples.regions.counts)
        return collate(samples, self.settings, counted=counted, contrast=Contrasted(own, kept, places))


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
        self._forwards = forwards(stream.settings, lengths, stream.steps.world_size)
        self._shares = _fixed_shares(stream, lengths, self._forwards)

    def __len__(self) -> int:
        return self._forwards

    def __getitem__(self, i: int) -> PretrainBatch:
        if not 0 <= i < self._forwards:
            raise IndexError(i)
        share = self._shares[i * self.stream.steps.world_size + self.stream.steps.rank]
        filler = len(share) == 0
        return self.stream.batch(self._draws, self._shares[0][:1] if filler else share, counted=not filler)


def _fixed_shares(stream: PretrainStream, lengths: Int64s, turns: int) -> list[Int64s]:
    """The samples of each forward of each rank, those of a turn side by side; some are empty where samples are few."""
    ranks = stream.steps.world_size
    if stream.settings.micro_tokens is None or len(lengths) < ranks:
        return np.array_split(np.argsort(-lengths, kind="stable"), turns * ranks)
    by_rank = shares(stream.settings, lengths, ranks, turns)
    return [by_rank[rank][turn] for turn in range(turns) for rank in range(ranks)]


def validation_batches(stream: PretrainStream, count: int) -> ValidationBatches:
    """The first ``count`` samples (or all there are) of ``stream`` at epoch 0, as micro-batches shared out over its ranks."""
    if count < 1:
        raise UsageError(f"validation needs at least one sample, got {count}")
    return ValidationBatches(stream, count)
