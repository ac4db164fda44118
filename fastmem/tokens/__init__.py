"""Tokens of images: encoding images, a cache of their tokens on disk, and the tokens of centre views."""
