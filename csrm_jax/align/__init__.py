"""Alignment under constraints: losses, advantages, multipliers."""
