"""What is logged of a run: metrics.jsonl, the terminal, and W&B."""
