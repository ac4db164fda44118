"""Image quality of a model, edited or not: samples, their distance to real images, and losses of real images."""
