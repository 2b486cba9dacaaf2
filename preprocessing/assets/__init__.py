"""Files that come with the package: the demo detector and its licence."""
