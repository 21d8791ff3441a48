"""The recipes, and the examples of the source texts."""
