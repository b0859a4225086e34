"""The command `sandbox-kernel`."""
