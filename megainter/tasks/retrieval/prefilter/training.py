"""Training of the first stage: captions and images of a batch against each other, with a symmetric contrastive loss (InfoNCE)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.matching import with_regions
from megainter.data.packed import region_rows
from megainter.data.stream.negatives import require_two_images
from megainter.data.stream.order import permuted
from megainter.data.tables.pairs import Pairs, read_pairs
from megainter.devices import torch_device
from megainter.errors import NumericsError, UsageError
from megainter.files import require_file_place
from megainter.model.folder import locate_model, read_config, read_vocabulary
from megainter.progress import Progress
from megainter.tasks.retrieval.gallery import Tokens, tokenize
from megainter.tasks.retrieval.prefilter.towers import SETTINGS, DualEncoder, PrefilterSettings, save_prefilter

WORDS = "interbert.text_embeddings.word.weight"
LARGEST_SCALE = 100.0  # as in CLIP
WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class PrefilterTraining:
    """How it is trained; see `finetune`."""

    epochs: int = 10
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.2
    seed: int = 0


def finetune(
    model: Path,
    pairs: Path,
    store: Path,
    *,
    output: Path,
    split: str = "train",
    max_regions: int = 36,
    max_text_tokens: int = 36,
    max_bad: float = 0.01,
    training: PrefilterTraining | None = None,
    device: str = "auto",
) -> Path:
    """Train a dual encoder on the captions of ``split`` and write its folder; words begin as ``model`` embeds them. Returns ``output``.

    Which captions meet in a batch is a function of the seed and the epoch. ``UsageError`` for inputs that do not fit, and for an
    ``output`` that holds something else; ``NumericsError`` where the loss is not a number.
    """
    training = training or PrefilterTraining()
    _check(training, max_regions, max_text_tokens, output)

    # What is learned from, and the words to begin with.
    model = locate_model(model).path
    config = read_config(model)
    vocabulary = read_vocabulary(model, config)
    feature_store = FeatureStore(store)
    captions = with_regions(read_pairs(pairs, split=split), feature_store, max_bad, pairs, "--max-bad")
    require_two_images(captions.image_numbers, str(pairs))
    tokens = tokenize(captions.table.column("caption").to_pylist(), vocabulary, max_text_tokens)
    words = read_words(model, vocabulary.size)

    # The encoder, from the seed alone.
    settings = PrefilterSettings(
        vocabulary_digest=vocabulary.digest,
        vocabulary_size=vocabulary.size,
        word_size=words.shape[1],
        feature_size=feature_store.schema.feature_size,
        max_text_tokens=max_text_tokens,
        max_regions=max_regions,
        detector=feature_store.schema.described_by,
    )
    on = torch_device(device)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        encoder = DualEncoder(settings, training.dropout)
        encoder.text.word.weight.data.copy_(words)
        train(encoder.to(on), captions, tokens, feature_store, training)

    save_prefilter(output, encoder)
    print(f"prefilter: {output}", flush=True)
    return output


def train(encoder: DualEncoder, pairs: Pairs, tokens: Tokens, store: FeatureStore, training: PrefilterTraining) -> None:
    """AdamW with a linear warmup and a cosine to zero; the last batch of an epoch is left out where it is short."""
    batch = min(training.batch, len(pairs))
    steps = training.epochs * (len(pairs) // batch)
    device = encoder.log_scale.device
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters(encoder, training.weight_decay), lr=training.learning_rate, fused=fused)
    encoder.train()
    with Progress("training the prefilter", steps * batch, "captions") as progress:
        for step, rows in enumerate(batches(training, len(pairs), batch)):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * schedule(step, steps)
            loss = loss_of(encoder, pairs, rows, tokens, store, device)
            if not math.isfinite(float(loss.detach())):
                raise NumericsError(f"step {step}: the loss is {float(loss.detach())}; give a lower --learning-rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                encoder.log_scale.clamp_(max=math.log(LARGEST_SCALE))
            progress.update(batch, f"loss {float(loss.detach()):.3f}")


def parameters(encoder: DualEncoder, weight_decay: float) -> list[dict[str, object]]:
    """Linear layers decay; embeddings, biases, norms and the scale do not."""
    decayed = [module.weight for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    others = [parameter for parameter in encoder.parameters() if not any(parameter is one for one in decayed)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(step: int, steps: int) -> float:
    """The share of the rate at a step: linear from 0 over the warmup, then half a cosine to 0."""
    warmup = WARMUP * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def batches(training: PrefilterTraining, captions: int, batch: int) -> Iterator[NDArray[np.int64]]:
    """Rows of each step's captions, int64 [batch]: every epoch a shuffle of its own, a short rest left out."""
    for epoch in range(training.epochs):
        rows = permuted(training.seed, epoch, np.arange(captions), captions)
        for start in range(0, captions - batch + 1, batch):
            yield rows[start : start + batch]


def loss_of(
    encoder: DualEncoder, pairs: Pairs, rows: NDArray[np.int64], tokens: Tokens, store: FeatureStore, device: torch.device
) -> torch.Tensor:
    """The contrastive loss of the captions in ``rows`` and their images, each image once."""
    images, image_of_caption = np.unique(pairs.image_numbers[rows], return_inverse=True)
    features, locations, lengths = region_rows(
        store.views([pairs.image_ids[i] for i in images], encoder.settings.max_regions), encoder.settings.max_regions
    )
    ids, text_lengths = tokens.take(rows)
    texts = encoder.text(ids.to(device), text_lengths)
    regions = encoder.region(features.to(device), locations.to(device), lengths)
    return contrastive_loss(encoder.log_scale.exp() * texts @ regions.T, torch.from_numpy(image_of_caption).to(device))


def contrastive_loss(logits_CI: torch.Tensor, image_of_caption_C: torch.Tensor) -> torch.Tensor:
    """Mean over captions of both directions: which of the images is the caption's own, and which of the captions is the image's.

    Captions of one image are no wrong answers to each other: the second asks for one of them among all captions of other images.
    """
    to_image = F.cross_entropy(logits_CI, image_of_caption_C)
    own_C = logits_CI.gather(1, image_of_caption_C[:, None])[:, 0]
    mine_CI = image_of_caption_C[:, None] == torch.arange(logits_CI.shape[1], device=logits_CI.device)
    wrong_I = logits_CI.masked_fill(mine_CI, -math.inf).logsumexp(0)
    to_text = (torch.logaddexp(own_C, wrong_I[image_of_caption_C]) - own_C).mean()
    return (to_image + to_text) / 2


def read_words(model: Path, vocabulary_size: int) -> torch.Tensor:
    """The model's word embeddings, float32 [vocabulary_size, E]; ``UsageError`` where its folder has none."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if WORDS in file.keys():  # noqa: SIM118 (the file is no dictionary)
                words: torch.Tensor = file.get_tensor(WORDS)[:vocabulary_size].float()
                return words
    raise UsageError(f"{model} has no word embeddings ({WORDS}) to begin with; give a pretrained or fine-tuned model")


def _check(training: PrefilterTraining, max_regions: int, max_text_tokens: int, output: Path) -> None:
    least = {"--epochs": (training.epochs, 1), "--batch": (training.batch, 2), "--max-regions": (max_regions, 1)}
    for option, (number, smallest) in (least | {"--max-text-tokens": (max_text_tokens, 3)}).items():
        if number < smallest:
            raise UsageError(f"{option} is {number}; give at least {smallest}")
    if not training.learning_rate > 0 or training.weight_decay < 0 or not 0 <= training.dropout < 1:
        raise UsageError("--learning-rate must be above 0, --weight-decay at least 0, --dropout at least 0 and below 1")
    if output.is_dir() and any(output.iterdir()) and not (output / SETTINGS).is_file():
        raise UsageError(f"--output {output} is a folder with something else in it; name a new one")
    require_file_place(output / SETTINGS, "--output")
