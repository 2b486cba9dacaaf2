"""Pages and pictures to look at: images with boxes, curves, retrieved images."""
