"""Extraction: embeddings of images, the index of a training set, and what can be pulled out of a model."""
