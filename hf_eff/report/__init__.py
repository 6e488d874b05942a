"""What a run predicted beside what it measured, and the cards that describe methods and runs."""
