"""Text → tokenizer and token shards, and reading them back."""
