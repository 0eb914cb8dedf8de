"""``chronos VERB`` and ``python -m chronos VERB``."""

import sys


def run() -> None:
    """Run the command line; returns only by SystemExit."""
    try:
        from chronos.cli import main  # here, for Ctrl-C is to be no traceback while it is imported

        main()
    except KeyboardInterrupt:  # while starting: afterwards each verb has its own way to stop
        sys.stderr.write("Error: stopped before anything was done; nothing was changed\n")
        sys.exit(2)


if __name__ == "__main__":
    run()
