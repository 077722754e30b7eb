"""Networks and weights of other projects: read as data, never executed."""
