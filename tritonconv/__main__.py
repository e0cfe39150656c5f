"""``python -m tritonconv`` is the command ``tritonconv``."""

import sys

from tritonconv.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
