"""Rank and select units by their statistics, and find out how reliable a ranking is and which images own the units."""
