"""Text into datasets."""
