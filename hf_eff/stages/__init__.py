"""What surrounds a selection method: stages before it, a check of its proxy, a cap on its cost."""
