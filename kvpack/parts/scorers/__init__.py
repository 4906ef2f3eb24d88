"""Scorers: how important each token is, per head."""
