"""`python -m kvpack`: the same as the `kvpack` command."""

from kvpack.cli import main

main()
