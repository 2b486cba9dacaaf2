"""From captions and regions to packed micro-batches: manifest, feature store, text, order, masking, negatives, batch."""
