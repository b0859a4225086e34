"""Templates: VMs saved with a warm kernel in them, from which others are restored."""
