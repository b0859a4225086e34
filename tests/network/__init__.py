"""What a network policy lets through, and what not, in an internet of the tests' own."""
