"""Evaluation of a network, and the job that evaluates a run or a weight file."""
