"""`python -m nsgf_nb` is the `nsgf` command."""
import sys

from nsgf_nb.cli import main

sys.exit(main())
