"""Images by captions and captions by images."""
