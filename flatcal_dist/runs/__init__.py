"""Run directories, their state, and sweeps of runs."""
