"""Whether machines are fit for a run: what each one is, what they are to each other, and what to do about it."""
