"""Scoring: one pass over the images that leaves statistics of every unit, and what each image's loss tells."""
