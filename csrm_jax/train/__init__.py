"""Training: optimizer, one step, the loop."""
