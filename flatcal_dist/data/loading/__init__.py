"""Batches for training and evaluation, in an order that can be resumed."""
