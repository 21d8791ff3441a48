"""`train_step`, and each step in the loops that people have."""
