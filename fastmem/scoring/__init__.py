"""Scoring: one pass over the images that leaves statistics of every unit."""

from fastmem.scoring.score import ScoreResult, responses, score

__all__ = ["ScoreResult", "responses", "score"]
