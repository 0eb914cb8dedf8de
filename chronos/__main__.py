"""``chronos VERB`` and ``python -m chronos VERB``."""

import sys


def run() -> None:
    """Run the command line; always ends in SystemExit."""
    try:
        from chronos.cli import main  # imported here so Ctrl-C while loading gives no traceback

        main()
    except KeyboardInterrupt:  # during startup; once started, each verb handles it
        sys.stderr.write("Error: stopped before anything was done; nothing was changed\n")
        sys.exit(2)


if __name__ == "__main__":
    run()
