"""The host's half of the agent: the protocol both halves share, and the client that speaks it."""
