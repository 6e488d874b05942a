"""Shared maths: pure functions, randomness passed in as a generator."""
