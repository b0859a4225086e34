"""The host side of vsock for one VM, as a userspace device or through the host's kernel."""
