"""What text is worth training on: cleaning, rules, duplicates, quality. Pure functions over batches of documents."""
