"""The index of a training set: SSCD embeddings of its images, and the search for the images nearest to others."""
