"""`python -m headscope.cli`."""

from headscope.cli import main

main()
