"""``python -m node``: the same as the ``rios`` command."""

import sys

from node.cli import main

sys.exit(main())
