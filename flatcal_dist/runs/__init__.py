"""Run directories, their state, and studies of runs."""
