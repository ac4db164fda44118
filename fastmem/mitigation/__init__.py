"""Edits of a model: choose units by attribution, scale their weights, undo that exactly, and save edits as files."""
