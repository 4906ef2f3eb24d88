"""From what magnitude on numbers of a token are kept."""
