"""Checkpoints in and out: official InterBERT, BERT, ZeRO shards, Hugging Face."""
