"""Studies: many runs from one file, their results, and the page on what they show."""
