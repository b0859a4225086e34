"""One process per VM: it owns QEMU, the host side of vsock, the relay, and the clean-up."""
