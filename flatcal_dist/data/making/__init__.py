"""Making shards, and finding what is wrong with them."""
