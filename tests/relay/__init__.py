"""The relay with a stock ipykernel as its guest; no VM."""
