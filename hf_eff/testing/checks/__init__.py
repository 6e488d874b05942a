"""The laws, one file per group; ``suite.checks_for`` picks those that bind a method."""
