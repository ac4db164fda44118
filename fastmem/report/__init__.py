"""Tables, pictures and JSON documents of the results of scoring, extraction and sweeps."""
