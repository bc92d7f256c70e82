"""What alignment needs beside the training loop: models that stay as they are."""
