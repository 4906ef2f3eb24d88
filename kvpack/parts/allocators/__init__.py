"""Allocators: where a budget of bits is spent."""
