"""The backbone and its reward head; the only part that imports Flax."""
