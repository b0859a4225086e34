"""Ports of a guest on the host's loopback: listening, and carrying what comes."""
