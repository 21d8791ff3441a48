"""Learning studies: wrong labels, other noise, learning rates, detection."""
