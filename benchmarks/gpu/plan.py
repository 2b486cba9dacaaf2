"""Which parts there are, most valuable first."""

from benchmarks.gpu.runner import Part

# A part's limit is what it may take where something hangs; all together they have nine minutes (540 s). Those that need not be alone run
# beside each other on a GPU.
PARTS = (
    Part("environment", "versions, the card, product rates, copy bandwidth, launch cost", 60, alone=True),
    Part("kernels", "every Triton kernel against float64", 150, alone=False),
    Part("attention", "every form of attention against float64", 150, alone=False),
    Part("step", "one pretraining step on the GPU and on the CPU", 150, alone=False),
    Part("zero", "a small model trained at every ZeRO stage and precision by DeepSpeed's launcher", 170, alone=False),
    Part("resume", "stopped, killed and gone on with; conversion to a Hugging Face folder", 170, alone=False),
    Part("waits", "where the host waits for the GPU in a step", 150, alone=False),
    Part("scenes", "a real training run to its score", 180, alone=False),
    Part("throughput", "training steps of the base model against the released computation and BERT", 220, alone=True),
    Part("pointwise", "Triton kernels and attention against PyTorch and torch.compile, with share of the bandwidth", 90, alone=True),
    Part("breakdown", "a profile of the step: kernels, launches, gaps", 70, alone=True),
    Part("extraction", "the R-101 detector and a light one: images a second, agreement", 130, alone=True),
    Part("scoring", "pairs a second of the base model", 50, alone=True),
    Part("loader", "samples a second that the loader feeds on all cores", 60, alone=True),
    Part("trainer", "the whole trainer on the base model, with its loader", 100, alone=True),
    Part("apex", "updates of the weights: ours, and apex's where its source is given", 150, alone=True),
)
