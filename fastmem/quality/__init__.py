"""What an edit costs in image quality: samples, features, distances to a reference, and teacher-forced losses."""
