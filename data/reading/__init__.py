"""Sources into documents: found, opened, read a record at a time, and an account of all that is left out."""
