"""Pretraining: objectives, optimiser, DeepSpeed engine, checkpoints, metrics and the loop that joins them."""
