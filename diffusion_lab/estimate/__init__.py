"""The cost of a run, whether it will work, and the size at which one network costs as another."""
