"""A third-party package with one selection method."""
