"""Speed figures, each measured against its alternative in the same run."""
