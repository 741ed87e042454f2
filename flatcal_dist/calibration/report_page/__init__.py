"""The page of a report: its table, its figures, and what they show in words."""
