"""From image files to a feature store: images, the detector and its training, extraction, captions, the demo's scenes."""
