"""Real processes: several hosts, and members that send corrupted gradients."""
