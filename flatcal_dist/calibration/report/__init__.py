"""The report of one evaluation: its figures as a model, and the files that it is written to."""
