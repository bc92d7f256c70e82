"""The story of a step, and the driver's side of it."""
