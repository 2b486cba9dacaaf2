"""Caption files by form."""
