"""Runs as jobs of a scheduler: checked here, written down in the run's folder, submitted, followed."""
