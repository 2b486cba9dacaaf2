"""InterBERT: configuration, packed core, heads, and the Hugging Face classes. Knows nothing of training.

Nothing is imported here, so that reading a configuration does not load the model: `from megainter import InterBertModel`, or
import the module that has what you need.
"""
