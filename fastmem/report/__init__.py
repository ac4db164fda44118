"""Tables, pictures and JSON documents of the results of scoring, extraction and sweeps."""

from fastmem.home import settle_matplotlib

# before a module of this folder imports it
settle_matplotlib()
