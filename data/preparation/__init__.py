"""Text of any size into a dataset: stages of tasks, each a function of its input alone, each done once."""
