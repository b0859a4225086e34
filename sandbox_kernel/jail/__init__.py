"""What holds a VM's processes in: the bubblewrap jail, rlimits, the host's cgroup, and the guardian."""
