"""One rank of a DeepSpeed training that saves DeepSpeed's own checkpoint, and beside it the fp32 masters gathered while it ran.

Arguments: ZeRO stage, precision (fp32, bf16 or bf16-fp32, which accumulates in fp32), folder, names (ours or official).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from megainter import InterBertForPreTraining
from megainter.conversion.official_names import official_names
from tests.model.tiny import packed_batch, tiny_model


class OfficialTextHead(nn.Module):
    """The official head of masked segments: the bias stands beside the decoder, whose weight is the word embeddings."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense, self.transform.LayerNorm = head.transform, head.norm
        self.decoder = nn.Linear(head.decoder.in_features, head.decoder.out_features, bias=False)
        self.decoder.weight, self.bias = head.decoder.weight, head.decoder.bias

    def forward(self, x_MH: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform.LayerNorm(self.transform.dense(x_MH))) + self.bias


class Renamed(nn.Module):
    """A model whose modules stand where the official ones do, so that DeepSpeed finds (and at stage 3 gathers) what it does there."""

    def __init__(self, model: InterBertForPreTraining) -> None:
        super().__init__()
        object.__setattr__(self, "inner", model)
        names = official_names([name for name, _ in model.named_parameters() if not name.startswith("msm_head.")], model.config)
        model.msm_head = OfficialTextHead(model.msm_head)  # type: ignore[assignment]
        places = {theirs.rpartition(".")[0]: model.get_submodule(ours.rpartition(".")[0]) for ours, theirs in names.items()}
        for path, module in (places | {"cls.predictions": model.msm_head}).items():
            place: nn.Module = self
            *parents, last = path.split(".")
            for part in parents:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]  # type: ignore[assignment]
            place.add_module(last, module)


def settings(stage: int, precision: str) -> dict[str, object]:
    config: dict[str, object] = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "sub_group_size": 5000} if stage == 3 else {"stage": stage},
    }
    if precision != "fp32":
        config["bf16"] = {"enabled": True}
    if precision == "bf16-fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def main(stage: int, precision: str, folder: Path, names: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    inner = tiny_model().train()
    model = inner if names == "ours" else Renamed(inner)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, precision))[0]
    for step in range(2):
        scores = inner.score_packed(packed_batch(10 * step + dist.get_rank()), torch.arange(5), torch.arange(4))
        loss = sum(logits.float().pow(2).mean() for logits in scores)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})
    masters = {name: (safe_get_full_fp32_param(p) if stage else p).detach().clone() for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(masters, folder / "masters.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
