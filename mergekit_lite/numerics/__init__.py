"""Arithmetic that knows tensors and no tasks."""
