"""What a run reads: captions, regions, vocabulary, as the streams of training and validation."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megainter.config.settings import DataConfig, RunConfig
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.variety import hardly_varied
from megainter.data.integers import Int64s
from megainter.data.matching import Missing, accept_missing
from megainter.data.pairs_index.index import build_pairs_index, build_storage_order, open_pairs_index, open_storage_order
from megainter.data.stream.negatives import HardNegatives, read_hard_negatives
from megainter.data.tables.pairs import Pairs, has_split
from megainter.data.tables.parquet import ROWS_PER_GROUP
from megainter.data.text.chinese import WORDPIECE, segmentation
from megainter.data.text.token_table import build_token_table, open_token_table, table_key
from megainter.data.text.vocabulary import Vocabulary, load_vocabulary, train_vocabulary
from megainter.errors import UsageError
from megainter.files import sha256_of, write_atomically
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import keep_detector, require_detector, require_same_detector
from megainter.tasks.pretraining.batches import PretrainStream
from megainter.tasks.pretraining.sampling import Sampler, StreamSettings
from megainter.tasks.pretraining.scaling import keep_scaling
from megainter.training.collective import first_said, on_first_rank
from megainter.weights import origin_name

BLOCK = 4096  # samples, some hundred megabytes of records
log = logging.getLogger("megainter")


@dataclass(frozen=True)
class Sources:
    """The opened data of a run; ``validation`` is None where its split has no captions."""

    vocabulary: Vocabulary
    training: PretrainStream
    validation: PretrainStream | None
    store: FeatureStore
    samples: int  # captions of one epoch
    digests: dict[str, str]


def open_sources(config: RunConfig, rank: int, world_size: int) -> Sources:
    """Open everything on every rank; rank 0 makes the vocabulary and the token tables first. Collective.

    Raises ``UsageError`` for missing files, captions without images, one image only, or a store that contradicts the model settings.
    """
    data = config.data
    store = FeatureStore(data.store)
    check_store(config, store)
    pairs = mapped_pairs(config, "train", data.pairs, data.split, store)
    if rank == 0:
        _tell_of_one_class(config, store)

    # What reads the captions, and what wrong ones are drawn from.
    vocabulary_path = on_first_rank(lambda: place_vocabulary(data, pairs, config.output))
    vocabulary = load_vocabulary(vocabulary_path, lowercase=data.lowercase)
    hard_negatives = read_hard_negatives(data.hard_negatives, pairs) if data.hard_negatives is not None else None
    words = on_first_rank(lambda: word_boundaries(data, pairs))
    by_storage, storage_digest = storage_order(config, pairs, store) if data.order == "blocks" else (None, None)

    # The streams; validation may have a store of its own.
    training = _stream(
        config=config,
        name="train",
        pairs=pairs,
        store=store,
        vocabulary=vocabulary,
        words=words,
        rank=rank,
        world_size=world_size,
        hard_negatives=hard_negatives,
        by_storage=by_storage,
    )
    validation = _validation(config, store, vocabulary, words, rank, world_size)

    # What a resumed run must find again.
    digests = {"pairs": pairs.digest, "store": store.digest, "vocabulary": vocabulary.digest}
    if words != WORDPIECE:
        digests["words"] = words
    if storage_digest is not None:
        digests["storage_order"] = storage_digest
    if data.hard_negatives is not None:
        digests["hard_negatives"] = sha256_of(data.hard_negatives)

    if world_size > 1:
        verify_together([store] if validation is None else [store, validation.sampler.store])
    return Sources(
        vocabulary=vocabulary,
        training=training,
        validation=validation,
        store=store,
        samples=len(pairs),
        digests=digests,
    )


def _tell_of_one_class(config: RunConfig, store: FeatureStore) -> None:
    """A warning where masked regions are judged by classes and there is hardly more than one."""
    judged = config.training.mrm_weight > 0 and config.model.region_objective == "class"
    if judged and (told := hardly_varied(store)):
        log.warning("%s", told)


def verify_together(stores: list[FeatureStore]) -> None:
    """Let a record that one rank of a host, or one of its loader processes, has read whole and verified count for all of them. Collective.

    Where the host has no shared memory for it each rank verifies for itself, which the log says.
    """
    token = on_first_rank(lambda: secrets.token_hex(16))
    with ExitStack() as stack:
        reasons = [stack.enter_context(store.verified_together(token)) for store in {id(store): store for store in stores}.values()]
        told = first_said(next((reason for reason in reasons if reason is not None), None))  # an answer of all: nobody leaves before
    if told is not None:
        log.warning("every rank reads and verifies each record itself, once, not once for all ranks of its host: %s", told)


def word_boundaries(data: DataConfig, pairs: Pairs) -> str:
    """What tells the words of these captions apart, where whole words are masked; it is part of what a resumed run must have again."""
    if data.masking != "paper":
        return WORDPIECE
    words = segmentation(data.word_segmentation, pairs.table.column("caption"), pairs.chinese_share)
    if words != WORDPIECE:
        log.info("words of Chinese captions are found by %s", words)
    return words


def place_vocabulary(data: DataConfig, pairs: Pairs, output: Path) -> Path:
    """The run's ``vocab.txt``: a copy of the given one, or one trained on the captions.

    A run with checkpoints keeps the vocabulary it has; ``UsageError`` where another one is given for it. Before the first checkpoint
    what an earlier attempt left is made anew, since that may have read other captions.
    """
    path = output / "vocab.txt"
    output.mkdir(parents=True, exist_ok=True)
    if data.vocabulary is not None and not data.vocabulary.is_file():
        raise UsageError(f"vocabulary {data.vocabulary} does not exist; leave data.vocabulary out to train one on the captions")
    kept = sorted((output / "checkpoints").glob("step_*/vocab.txt"))
    if kept:
        if data.vocabulary is not None and data.vocabulary.read_bytes() != kept[-1].read_bytes():
            raise UsageError(f"{output} holds a run with another vocabulary than {data.vocabulary}; start in another output folder")
        write_atomically(path, kept[-1].read_bytes())
    elif data.vocabulary is not None:
        write_atomically(path, data.vocabulary.read_bytes())
    else:
        train_vocabulary(all_captions(pairs), data.vocabulary_size, path, lowercase=data.lowercase)
    return path


def all_captions(pairs: Pairs) -> Iterator[str]:
    """Every caption, in parts: millions of Python strings at once would be gigabytes."""
    captions = pairs.table.column("caption")
    for start in range(0, len(captions), ROWS_PER_GROUP):
        yield from captions.slice(start, ROWS_PER_GROUP).to_pylist()


def mapped_pairs(config: RunConfig, name: str, manifest: Path, split: str, store: FeatureStore) -> Pairs:
    """The pairs of ``split`` whose images have regions, mapped from the run's cache, where rank 0 puts them first. Collective.

    ``TooManyBadInputsError`` where more than ``data.max_bad`` of the images have none.
    """
    folder = config.output / "cache" / f"pairs-{name}"
    key, facts = on_first_rank(lambda: build_pairs_index(manifest, split, store, folder))
    if facts.rows < facts.manifest_rows:
        count, images = facts.manifest_rows - facts.rows, facts.images + facts.lacking
        missing = Missing("captions", count, facts.manifest_rows, facts.missing, facts.lacking, images)
        accept_missing(missing, store, config.data.max_bad, manifest)
    return open_pairs_index(folder, key, store)


def storage_order(config: RunConfig, pairs: Pairs, store: FeatureStore) -> tuple[Int64s, str]:
    """Rows of the pairs by storage, mapped from the run's cache, where rank 0 puts them first, and their digest. Collective."""
    folder = config.output / "cache" / "storage-order"
    return open_storage_order(folder, on_first_rank(lambda: build_storage_order(pairs, store, folder)))


def _stream(
    config: RunConfig,
    name: str,
    pairs: Pairs,
    store: FeatureStore,
    vocabulary: Vocabulary,
    words: str,
    rank: int,
    world_size: int,
    hard_negatives: HardNegatives | None = None,
    by_storage: Int64s | None = None,
) -> PretrainStream:
    data, training = config.data, config.training
    table = config.output / "cache" / f"tokens-{name}.arrow"
    on_first_rank(lambda: _ignore(build_token_table(pairs, vocabulary, data.max_text_tokens, table, words=words)))
    tokens = open_token_table(table, table_key(pairs, vocabulary, data.max_text_tokens, words))
    settings = StreamSettings(
        seed=training.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        micro_tokens=training.micro_tokens,
        max_regions=data.max_regions,
        masking=data.masking,
        conditional_masking=data.conditional_masking,
        mask_text=training.msm_weight > 0,
        mask_regions=training.mrm_weight > 0,
        mismatch_probability=data.mismatch_probability if training.itm_weight > 0 else 0.0,
        hard_negative_share=data.hard_negative_share,
        region_objective=config.model.region_objective,
        gate_msm=data.gate_msm,
        contrast=training.itc_weight > 0,
        contrast_drop=data.contrast_drop if name == "train" else 0.0,
        batch_negatives=data.batch_negatives if name == "train" else 0.0,
        shuffle=name == "train",
        block=(data.block or BLOCK) if by_storage is not None else 0,
    )
    sampler = Sampler(
        pairs=pairs,
        store=store,
        tokens=tokens,
        vocabulary=vocabulary.facts,
        settings=settings,
        hard_negatives=hard_negatives,
        by_storage=by_storage,
    )
    return PretrainStream(sampler, rank, world_size)


def _ignore(value: object) -> None:
    """Keep a large result from being broadcast."""


def _validation(
    config: RunConfig, store: FeatureStore, vocabulary: Vocabulary, words: str, rank: int, world_size: int
) -> PretrainStream | None:
    settings = config.validation
    path = settings.pairs or config.data.pairs
    if settings.pairs is None and not has_split(path, settings.split):
        return None
    own = FeatureStore(settings.store) if settings.store is not None else store
    require_same_detector(store, own, "validation.store")
    pairs = mapped_pairs(config, "validation", path, settings.split, own)
    return _stream(
        config=config, name="validation", pairs=pairs, store=own, vocabulary=vocabulary, words=words, rank=rank, world_size=world_size
    )


def check_store(config: RunConfig, store: FeatureStore) -> None:
    """``UsageError`` where a size stated in [model], or a size or the detector brought by the start, is not the store's."""
    stated = {"region_feature_size": store.schema.feature_size, "num_region_classes": store.schema.num_classes}
    start = config.model.start_from
    for name, size in stated.items():
        given = getattr(config.model, name)
        if given is not None and given != size and start is not None:
            raise UsageError(
                f"model.start_from {start} has {name} {given}, the features in {config.data.store} have {size}: take a start made for them "
                f"(of a BERT `megainter convert bert BERT START --store {config.data.store}` makes one)"
            )
        if given is not None and given != size:
            raise UsageError(
                f"model.{name} is {given}, but the features in {config.data.store} have {size}; leave it out to take the store's"
            )
    if start is not None:
        # Without the fact nothing is said: a BERT has seen no regions.
        require_detector(InterBertConfig.from_pretrained(start), start, store, "--data.other_detector true", config.data.other_detector)


def model_configuration(config: RunConfig, vocabulary_size: int, store: FeatureStore) -> InterBertConfig:
    """The model's configuration: sizes from the data, the rest from [model]."""
    model = config.model
    if model.vocab_size is not None and model.vocab_size < vocabulary_size:
        raise UsageError(f"model.vocab_size {model.vocab_size} is smaller than the vocabulary's {vocabulary_size} entries; leave it out")
    apart = {"start_from", "gradient_checkpointing", "vocab_size", "region_feature_size", "num_region_classes", "itc_size"}
    apart |= {"standardize_regions"}
    names = [name for name in vars(model) if name not in apart and not name.startswith("_")]
    found = InterBertConfig(
        vocab_size=model.vocab_size or vocabulary_size,
        region_feature_size=store.schema.feature_size,
        num_region_classes=store.schema.num_classes,
        max_regions=config.data.max_regions,
        max_text_tokens=config.data.max_text_tokens,
        itc_size=model.itc_size if config.training.itc_weight > 0 else 0,
        **{name: getattr(model, name) for name in names},
    )
    if model.standardize_regions:
        keep_scaling(found, store, config.data.max_regions, model.start_from)
    keep_detector(found, store.schema, origin_name(store.path))
    return found
