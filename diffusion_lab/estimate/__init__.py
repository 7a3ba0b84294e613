"""The cost of a composition, and the size at which one costs as much as another."""
