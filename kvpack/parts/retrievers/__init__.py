"""Which cached tokens a query reads."""
