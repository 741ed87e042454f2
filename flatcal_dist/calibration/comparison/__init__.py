"""The comparison of several runs by method and seed."""
