"""What a pretrained model is measured on and tuned for: one module per task, the same function names in each."""
