"""`python -m p2pgz`."""

from p2pgz.cli import main

main()
