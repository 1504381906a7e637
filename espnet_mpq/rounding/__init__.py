"""Rounds a whole model by second order, every matrix after those that its inputs pass."""
