"""Ranks: how they start, agree, fail together and end."""
