"""Training whatever a task's job says: optimiser, DeepSpeed engine, checkpoints, metrics, and the loop that joins them."""
