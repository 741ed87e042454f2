"""The page of a report: its table, pictures, and what they show in words."""
