"""`python -m normuon_lab`, the same as `normuon`, for torchrun's `-m`."""

import sys

from normuon_lab.entry import main

if __name__ == "__main__":
    sys.exit(main())
