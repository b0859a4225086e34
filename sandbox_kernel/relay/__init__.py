"""Jupyter's five channels on the host: forwarding, and truthful reports of a kernel's death."""
