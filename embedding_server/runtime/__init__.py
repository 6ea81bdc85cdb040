"""How one graph runs: tokenizer and session."""
