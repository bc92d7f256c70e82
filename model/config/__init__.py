"""What a model is: the frozen, validated description of an architecture."""
