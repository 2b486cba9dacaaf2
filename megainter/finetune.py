"""``python -m megainter.finetune TASK --config RECIPE.toml [--section.key value ...]``: what a launcher starts on every rank.

deepspeed --module megainter.finetune retrieval --config RECIPE.toml
torchrun --nproc-per-node 2 --module megainter.finetune retrieval --config RECIPE.toml
"""

import sys

from megainter.cli import main

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N; the environment says the same.
    main(["finetune", *(token for token in sys.argv[1:] if not token.startswith("--local_rank"))])
