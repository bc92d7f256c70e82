"""What is learnt from: corpora, tokenizer, shards, order and the stream a rank iterates."""
