"""The deterministic stream of samples: order, masks, negatives, portions, loading."""
