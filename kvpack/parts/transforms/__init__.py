"""Transforms: changes of basis before a codec."""
