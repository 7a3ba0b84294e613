"""The ground of all other rooms: errors, files, images, randomness, progress."""
