"""Pure functions from float weights to grids, scales and codes; imports nothing but errors."""
