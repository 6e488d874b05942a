"""Machinery that several methods share, one concept a file."""
