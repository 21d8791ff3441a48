"""`speed`: time and memory, beside rivals. `learning`: what training with it gains."""
