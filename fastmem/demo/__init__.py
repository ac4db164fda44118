"""The images and tiny models in the package, and checks on them; ``python -m fastmem.demo.train`` trains the models."""
