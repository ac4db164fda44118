"""Weakening units: scaling their rows in place and exactly undoing it, edit files, edited checkpoints, attribution."""
