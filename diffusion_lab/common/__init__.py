"""The base of all other packages: messages, files, images, randomness, ranges."""
