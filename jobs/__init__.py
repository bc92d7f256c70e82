"""What a person asks for: the command line, recipes, the training loop, generation."""
