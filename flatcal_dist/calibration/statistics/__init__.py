"""Intervals by resampling, exact tests, and differences over seeds."""
