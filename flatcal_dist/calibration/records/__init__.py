"""The records of evaluated images, and the import of files of logits from elsewhere."""
