"""`python -m ropo`, as for `accelerate launch -m ropo train ...`."""

import sys

from ropo.cli.main import main

sys.exit(main())
