"""Code that wants more than it may have, one notebook cell a case: what limits it, and what is seen of it."""
