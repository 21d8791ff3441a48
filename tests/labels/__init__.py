"""What neighbors reveal about labels."""
