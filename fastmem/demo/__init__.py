"""The embedded images and the tiny models trained on them; ``python -m fastmem.demo.train`` makes the weights anew."""
