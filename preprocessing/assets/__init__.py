"""Files that come with the package: detectors and their licences."""
