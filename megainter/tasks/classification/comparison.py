"""Is InterBERT's text path as good as the BERT it came from? Both fine-tuned alike, side by side (paper: "comparable to BERT in
single-modal tasks").

Same examples in the same order, same number of steps, same optimiser and schedule, same seed; each with its own pooler and a new
classifier. BERT is transformers' own model inside the same training loop.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from megainter.conversion.bert import bert_config_file, bert_settings
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.files import require_own_files, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertPreTrainedModel
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.classification.training import OpenTask, finetune, open_task, task_job
from megainter.training import engine
from megainter.training.job import Job
from megainter.training.loop import train
from megainter.training.metrics import read_metrics
from megainter.training.world import World

BERT_RUN, TABLE = "bert", "comparison.json"


@dataclass(frozen=True)
class Side:
    """One of the two models: its figures after the last step and at its best validation, and the seconds of a step."""

    model: str
    parameters: int
    last: dict[str, float]
    best: dict[str, float]
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both models on one task; ``figure`` is the one by which the best validation is chosen."""

    task: str
    figure: str
    training_examples: int
    validation_examples: int
    steps: int
    interbert: Side
    bert: Side


class BertForComparison(InterBertPreTrainedModel):
    """transformers' BertForSequenceClassification behind the packed door. ``config.bert`` is BERT's own configuration."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.bert = BertForSequenceClassification(BertConfig(**config.bert))  # type: ignore[attr-defined]

    def score_packed(self, inputs: PackedInputs) -> Tensor:
        """Logits [S, num_labels] of texts without regions."""
        lengths: list[int] = inputs.text_lengths.tolist()
        ids, types = (pad_sequence(list(t.split(lengths)), batch_first=True) for t in (inputs.input_ids, inputs.token_type_ids))
        real = (torch.arange(max(lengths))[None, :] < inputs.text_lengths[:, None]).to(ids.device)
        logits: Tensor = self.bert(input_ids=ids, attention_mask=real.long(), token_type_ids=types).logits
        return logits


def compare(config: ClassificationConfig, bert: Path) -> None:
    """Fine-tune InterBERT as ``config`` says and the BERT of folder ``bert`` likewise, in ``<output>`` and ``<output>/bert``.

    Writes ``<output>/comparison.json`` and prints a table. Runs alone or as one rank of any launcher; the same command goes on where it
    was. ``UsageError`` for examples with images, settings that mean something to InterBERT alone, or another vocabulary.
    """
    _refuse_one_sided(config)
    task = open_task(config)
    _check(task, bert, config)
    other = dataclasses.replace(config, output=config.output / BERT_RUN)
    with engine.distributed() as world:
        finetune(config)
        train(other, lambda world: _bert_job(other, bert, world))
        if world.rank == 0:
            result = _collect(config, other, task)
            write_json(config.output / TABLE, dataclasses.asdict(result))
            print(table(result), flush=True)


def _collect(config: ClassificationConfig, other: ClassificationConfig, task: OpenTask) -> Comparison:
    """What both finished runs have to say."""
    sides = [_side(path, task.figure or "", name) for path, name in ((config.output, "InterBERT, text path"), (other.output, "BERT"))]
    assert task.validation is not None
    steps = int(read_metrics(config.output / "metrics.jsonl", "validation")[-1]["step"])
    return Comparison(task.facts.name, task.figure or "", len(task.training), len(task.validation), steps, *sides)


def _refuse_one_sided(config: ClassificationConfig) -> None:
    optimizer = config.optimizer
    one_sided = {
        "optimizer.start_rate": optimizer.start_rate != 1,
        "optimizer.layer_decay": optimizer.layer_decay != 1,
        "model.gradient_checkpointing": config.model.gradient_checkpointing,
    }
    for name, given in one_sided.items():
        if given:
            raise UsageError(f"{name} means something to InterBERT alone; leave it out of a comparison")


def _check(task: OpenTask, bert: Path, config: ClassificationConfig) -> None:
    """``UsageError`` where the two models could not read the same texts, or nothing would be compared."""
    if task.training.images:
        raise UsageError("a BERT has no regions: the comparison is for texts alone, and these examples have images")
    if task.validation is None:
        raise UsageError(f"nothing to compare: there are no examples of split {config.validation.split!r}")
    vocabulary = bert / "vocab.txt"
    if not vocabulary.is_file() or vocabulary.read_text(encoding="utf-8").split() != task.start.vocabulary_file.decode().split():
        raise UsageError(f"{bert} has not the vocabulary of {task.start.folder}; give the BERT that it came from")
    bert_settings(bert_config_file(bert), bert)


def _bert_job(config: ClassificationConfig, bert: Path, world: World) -> Job:
    """The same job with the BERT of folder ``bert`` as the model."""
    task = open_task(config)
    settings = bert_settings(bert_config_file(bert), bert)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        settings[name] = getattr(task.start.config, name)
    settings |= {"num_labels": task.start.config.num_labels, "classifier_dropout": None}
    settings["attn_implementation"] = "sdpa" if world.device.type == "cuda" else "eager"  # eager is faster on CPU at these lengths
    task.start.config.bert = settings  # type: ignore[attr-defined]
    return task_job(config, task, world, lambda saved: _bert_model(saved or task.start.config, bert, fresh=saved is None))


def _bert_model(config: InterBertConfig, folder: Path, fresh: bool) -> BertForComparison:
    """The model with the BERT's weights and a new classifier; bare where a checkpoint's weights follow."""
    model = BertForComparison(config)
    if not fresh:
        return model
    require_own_files(folder)
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = BertForSequenceClassification.from_pretrained(
            folder, config=model.bert.config, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder} cannot be loaded as a BERT: {str(error).splitlines()[0]}") from None
    model.bert, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(("classifier.", "bert.pooler.")))
    if missing:
        raise UsageError(f"{folder} lacks {len(missing)} parameters of a BERT, first {missing[0]}")
    return model


def _side(run: Path, figure: str, name: str) -> Side:
    """A finished run's figures."""
    records = read_metrics(run / "metrics.jsonl", "validation")
    rates = read_metrics(run / "metrics.jsonl", "train")
    best = max(records, key=lambda record: record[figure])
    seconds = sum(record["step_seconds"] for record in rates) / len(rates)
    return Side(name, _parameters(run), _figures(records[-1]), _figures(best), round(seconds, 4))


def _figures(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name not in ("kind", "time")}


def _parameters(run: Path) -> int:
    """Parameters of a run's newest checkpoint, from the headers of its weights."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    total = 0
    for path in sorted(newest.glob("weights-*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(torch.Size(entry["shape"]).numel() for name, entry in header.items() if name != "__metadata__")
    return total


def table(result: Comparison) -> str:
    """Both models side by side, for people."""
    one, two = result.interbert, result.bert
    lines = [
        f"{result.task}: {result.training_examples:,} examples, {result.steps:,} steps, measured on {result.validation_examples:,}",
        f"{'':30}{'InterBERT, text path':>22}{'BERT':>12}{'difference':>12}",
    ]
    for title, mine, theirs in (("after the last step", one.last, two.last), ("at the best validation", one.best, two.best)):
        lines.append(title)
        lines += [
            f"  {name.replace('_', ' '):28}{mine[name]:22.4f}{theirs[name]:12.4f}{mine[name] - theirs[name]:+12.4f}"
            for name in mine
            if name != "step"
        ]
    lines.append(f"{'parameters':30}{one.parameters:22,}{two.parameters:12,}")
    lines.append(f"{'seconds per step':30}{one.step_seconds:22.3f}{two.step_seconds:12.3f}")
    return "\n".join(lines)
