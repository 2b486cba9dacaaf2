"""Images listed and decoded."""
