"""The recipe: its sections, reading it, and what is said of it."""
