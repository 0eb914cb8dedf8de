"""``python -m chronos VERB``."""

import sys

try:
    from chronos.cli import main

    main()
except KeyboardInterrupt:  # while starting: afterwards each verb has its own way to stop
    sys.stderr.write("Error: stopped before anything was done; nothing was changed\n")
    sys.exit(2)
