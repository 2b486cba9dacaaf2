"""Search as a local web page and a JSON service."""
