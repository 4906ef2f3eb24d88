"""Codecs: approximations of a block of numbers by fewer bytes."""
