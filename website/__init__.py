"""The site of the documentation (`make docs`): the repository's pages as they stand, and a reference generated from the source."""
