"""A third-party package with a selection method and a governor."""
