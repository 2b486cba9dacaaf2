"""The light first stage: one vector for a caption, one for an image."""
