"""Policies: which tokens stay exact, and when the others are encoded."""
