"""What is trained and measured: a folder for each task, pretraining among them, with the same file names for the same roles."""
