"""The laws: one registry of all steps, every law over all of it."""
