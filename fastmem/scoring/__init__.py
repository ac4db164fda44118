"""Scoring: one pass over the images that computes statistics of every unit, and the loss of every image if wanted."""
