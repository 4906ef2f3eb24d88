"""Parts: one folder per role, one file per piece of mathematics."""
