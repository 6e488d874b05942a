"""Runs without a model: what a policy is worth where the truth is known."""
