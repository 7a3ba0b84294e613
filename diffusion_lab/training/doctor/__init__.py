"""A look at a training run before it is made: what is wrong, and what could be better."""
