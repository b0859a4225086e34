"""What this host needs to run micro-VMs, what it has, and how it gets the rest."""
