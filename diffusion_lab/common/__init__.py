"""What every other room may use: errors, files, images, randomness, progress."""
