"""The host's files in a guest: directories that are mounted there."""
