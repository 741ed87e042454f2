"""The report on images under shift: corruptions and other test sets."""
