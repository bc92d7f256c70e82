"""What preferences, rewards and teachers make a model learn: objectives, which know no ranks."""
