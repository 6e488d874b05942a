"""One small, complete method of each kind: the pattern for a new file and the ground for mutants."""
