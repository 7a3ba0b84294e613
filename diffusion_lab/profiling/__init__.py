"""What a composition costs, and the size that costs as much as another."""
