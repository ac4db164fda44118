"""The page of a run: one HTML file that needs no network, with everything that the stages have found."""
