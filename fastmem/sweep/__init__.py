"""Sweeps: measure many edits of a model, how many images are still extracted and how much image quality they cost."""
