"""Jupyter kernels that run inside micro-VMs."""

__version__ = "0.1.0"
