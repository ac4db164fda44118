"""Fractions, factors, selections and seeds as one resumable table: what is extracted, and what it costs in quality."""
