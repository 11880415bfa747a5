"""`python -m jobs <job>` is `morlaif <job>`; this form also works through `ray job submit --working-dir .`."""

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main())
