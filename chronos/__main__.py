"""``python -m chronos VERB``."""

from chronos.cli import main

main()
