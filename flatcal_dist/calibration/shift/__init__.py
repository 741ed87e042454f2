"""The report on shifted data: corruptions and other test sets."""
