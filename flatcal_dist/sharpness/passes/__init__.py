"""The passes of a step: batches in, losses out, two passes through one function."""
