"""Fine-tuning for VCR: answers, rationales, or both at once, by a four-way cross-entropy over one score for each choice.

As the released code does it, with the same head for answers and rationales, but for these: both tasks share a step instead of taking turns,
so that one schedule fits both; and a model may be told which region a name in the text stands for (``model.tie_objects``).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megainter.data.stream.portions import Portions
from megainter.data.tables.questions import Questions
from megainter.errors import UsageError
from megainter.model.detector import require_same_detector
from megainter.model.interbert import InterBertForMultipleChoice
from megainter.tasks.starting import Start, finetune_job, inputs_flops, open_start
from megainter.tasks.vcr.batches import ChoiceSource, ChoiceStream, all_items
from megainter.tasks.vcr.inputs import (
    FACTS,
    KINDS,
    MODES,
    ExampleSettings,
    Stores,
    WordPieces,
    has_questions,
    open_questions,
    open_stores,
    require_labels,
)
from megainter.tasks.vcr.objective import ChoiceStep
from megainter.tasks.vcr.report import BOTH, Judged, accuracies, is_right
from megainter.tasks.vcr.settings import VcrConfig
from megainter.training.collective import summed
from megainter.training.job import Job
from megainter.training.world import World


def finetune(config: VcrConfig) -> Path:
    """Fine-tune as ``config`` says, alone or as one rank of any launcher; returns the folder of the result (``tasks.starting``)."""
    _check(config)
    return finetune_job(config, lambda world: open_job(config, world))


def _check(config: VcrConfig) -> None:
    data, training = config.data, config.training
    weights = (training.answer_weight, training.rationale_weight)
    if data.mode != "joint" and weights != (1.0, 1.0):
        raise UsageError("training.answer_weight and training.rationale_weight are for data.mode joint; leave them out")
    if weights == (0.0, 0.0):
        raise UsageError("training.answer_weight and training.rationale_weight are both 0: nothing would be learned")
    if data.objects_store is None and (config.model.tie_objects or data.max_objects is not None):
        name = "model.tie_objects" if config.model.tie_objects else "data.max_objects"
        raise UsageError(f"{name} is about the annotated boxes; give data.objects_store, what `megainter extract --boxes` wrote")
    if data.objects_store is None and config.validation.objects_store is not None:
        raise UsageError("validation.objects_store needs data.objects_store: a model is validated on what it is trained with")


def open_job(config: VcrConfig, world: World) -> Job:
    """Open the starting model, questions and regions on every rank. Collective."""
    data, kinds = config.data, MODES[config.data.mode]
    stores = open_stores(data.store, data.objects_store)
    start = _open_start(config, stores)

    # What it is trained and validated on.
    questions, digest = open_questions(data.questions, data.split, stores, data.max_bad)
    require_labels(questions, kinds, data.questions)
    examples = _examples(config, start, questions, stores)
    portions = Portions(config.training.seed, config.training.global_batch, config.training.micro_batch, config.training.micro_tokens)
    stream = ChoiceStream(examples, portions, world.rank, world.size)
    held_out = _held_out(config, start, stores)

    weights = (config.training.answer_weight, config.training.rationale_weight) if data.mode == "joint" else (1.0,)
    return Job(
        objectives=tuple(KINDS[kind] for kind in kinds),
        weights=weights,
        batches=stream,
        accumulation=stream.steps.accumulation,
        samples=stream.size,
        sample_ids=stream.sample_ids,
        places=stream.places,
        build_model=lambda saved: start.build(InterBertForMultipleChoice, saved, fresh="choice_head."),
        build_step=lambda model: ChoiceStep(model, weights),
        flops=lambda config, batch: inputs_flops(config, batch.inputs),
        vocabulary=start.vocabulary_file,
        lowercase=start.vocabulary.lowercase,
        digests={"questions": digest, "vocabulary": start.vocabulary.digest, **stores.digests},
        detector=start.config.detector,
        started=(_told(config, questions), _told_of(held_out, config)),
        workers=data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=_validation(config, held_out) if held_out is not None else None,
        validate_every=config.validation.every_steps,
        best=(BOTH if data.mode == "joint" else data.mode) + "_accuracy" if held_out is not None else None,
    )


def _open_start(config: VcrConfig, stores: Stores) -> Start:
    """The starting model, told in its configuration how it is fine-tuned: what `evaluate vcr` reads there."""
    data = config.data
    longest = max(data.max_answer_tokens, data.max_rationale_tokens)
    start = open_start(config.model, config.output, longest, data.max_regions, stores.detected, data.other_detector)
    if start.config.type_vocab_size < 2:
        raise UsageError(f"model.start_from {start.folder} knows one token type; VCR's questions and answers need two")
    start.config.tie_objects = config.model.tie_objects
    facts = {"mode": data.mode, "objects": data.objects_store is not None, **dataclasses.asdict(_settings(config))}
    setattr(start.config, FACTS, facts)
    return start


def _settings(config: VcrConfig) -> ExampleSettings:
    data = config.data
    return ExampleSettings(
        data.max_answer_tokens, data.max_rationale_tokens, data.max_regions, data.max_objects or data.max_regions, config.model.tie_objects
    )


def _examples(config: VcrConfig, start: Start, questions: Questions, stores: Stores) -> ChoiceSource:
    words = WordPieces.of(questions, start.vocabulary)
    return ChoiceSource(questions, stores, words, _settings(config), MODES[config.data.mode])


def _held_out(config: VcrConfig, start: Start, stores: Stores) -> ChoiceSource | None:
    """The validation's questions; None where the split has none."""
    wanted, data = config.validation, config.data
    path = wanted.questions or data.questions
    if wanted.questions is None and not has_questions(path, wanted.split):
        return None
    own = stores
    if wanted.store is not None or wanted.objects_store is not None:
        own = open_stores(wanted.store or data.store, wanted.objects_store or data.objects_store)
        require_same_detector(stores.detected, own.detected, "validation.store")
    questions, _ = open_questions(path, wanted.split, own, data.max_bad)
    questions = Questions(questions.table.slice(0, wanted.samples).combine_chunks())
    require_labels(questions, MODES[data.mode], path)
    return _examples(config, start, questions, own)


def _told(config: VcrConfig, questions: Questions) -> str:
    seen = "the detector's and the annotated boxes" if config.data.objects_store is not None else "the detector's boxes"
    tied = ", names tied to their boxes" if config.model.tie_objects else ""
    return f"{len(questions):,} questions, {config.data.mode}, on {seen}{tied}"


def _told_of(held_out: ChoiceSource | None, config: VcrConfig) -> str:
    if held_out is None:
        return f"no questions of split {config.validation.split!r}: no validation, the last checkpoint is the result"
    return f"validation: {len(held_out.questions):,} questions of split {config.validation.split!r}"


def _validation(config: VcrConfig, held_out: ChoiceSource) -> Callable[[Any, World], dict[str, float]]:
    """The function that measures accuracies; see ``Job.validate``."""
    items = all_items(held_out.questions, held_out.kinds, every_answer=False)
    size = config.training.micro_batch
    chunks = [list(range(first, min(first + size, len(items)))) for first in range(0, len(items), size)]
    ids = held_out.questions.table.column("question_id").to_pylist()

    def validate(trained: Any, world: World) -> dict[str, float]:
        right = torch.zeros(len(items), device=world.device)
        for turn in range(0, len(chunks), world.size):
            # Chunks are the same at every world size, and so are their figures; at ZeRO stage 3 all ranks must run as many forwards.
            mine = turn + world.rank
            places = chunks[min(mine, len(chunks) - 1)]
            batch = held_out.collate([held_out.of(items[place]) for place in places])
            logits = trained(batch.to(world.device), None).cpu().numpy()
            if mine < len(chunks):
                right[places] = torch.from_numpy(is_right(logits, batch.labels.numpy())).float().to(world.device)
        judged = summed(right).cpu().tolist()
        shares = accuracies(Judged(ids[item.row], item.kind, value > 0) for item, value in zip(items, judged, strict=True))
        return {f"{name}_accuracy": share for name, share in shares.items()}

    return validate
