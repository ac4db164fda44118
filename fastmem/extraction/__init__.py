"""Extraction of training images from a model: choose images, complete their first tokens, and judge the results."""
