"""What the machine offers and what a run takes from it: time, FLOPs, tokens, bytes, energy, money."""
