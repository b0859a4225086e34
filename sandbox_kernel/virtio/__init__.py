"""Virtio's device side: the guest's memory and its split virtqueues, seen as hostile input."""
