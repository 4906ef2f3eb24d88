"""Packers: bytes of a tensor as fewer bytes, exactly."""
