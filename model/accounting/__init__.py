"""What a model costs, from its config alone: parameters, FLOPs, bytes."""
