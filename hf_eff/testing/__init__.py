"""Conformance suite and toy material, shipped so that third-party methods can be held to the same law."""
