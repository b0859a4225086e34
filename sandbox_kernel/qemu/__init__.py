"""QEMU: its command line, and the one process that runs it."""
