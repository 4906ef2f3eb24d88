"""Speed and memory of an artifact beside its source, measured in turns by one process each."""
