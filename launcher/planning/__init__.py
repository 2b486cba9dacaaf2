"""What a run costs before it runs: memory, time, layouts, goodput."""
