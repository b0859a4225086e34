"""Jupyter's provisioner contract, and nothing else."""
