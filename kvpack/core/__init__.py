"""Types, roles, errors and the registry: what every other layer builds on."""
