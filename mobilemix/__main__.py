"""`python -m mobilemix`."""

from mobilemix.cli import main

main()
