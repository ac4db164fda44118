"""From images to tokens: encoding, the cache on disk, and the tokens of centre views."""
