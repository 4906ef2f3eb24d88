"""Measuring: text, statistics, and the pass over decoder blocks one at a time."""
