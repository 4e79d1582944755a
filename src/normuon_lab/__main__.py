"""`python -m normuon_lab`, which is `normuon`: what torchrun's `-m` starts."""

import sys

from normuon_lab.entry import main

if __name__ == "__main__":
    sys.exit(main())
