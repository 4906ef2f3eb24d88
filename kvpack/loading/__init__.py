"""Artifact -> transformers model: validation first, then packed modules, then the cache."""
