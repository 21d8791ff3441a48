"""The steps: oracles, identities and guarantees."""
