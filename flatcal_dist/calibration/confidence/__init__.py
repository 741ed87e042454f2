"""Sources of confidence: what a score of confidence is, what it needs, and the list of all."""
