"""Running an artifact in transformers: packed linears and the compressed cache."""
