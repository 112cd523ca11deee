"""Policies aligned with a judge: rollouts, multipliers, losses."""
