"""What a method implements: one short file per kind. Importing these loads no torch."""
