"""One function for every command, on an opened run."""
