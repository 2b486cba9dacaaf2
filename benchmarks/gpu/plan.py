"""Which parts there are, most valuable first."""

from benchmarks.gpu.runner import Part

# A part's limit is what it may take where something hangs; all together they have nine minutes (540 s).
PARTS = (
    Part("environment", "versions, the card, product rates, copy bandwidth, launch cost", 60, alone=True),
    Part("kernels", "every Triton kernel against float64", 110, alone=False),
    Part("attention", "every form of attention against float64", 110, alone=False),
    Part("step", "one pretraining step on the GPU and on the CPU", 110, alone=False),
)
