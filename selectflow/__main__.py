"""`python -m selectflow`."""

from selectflow.cli import main

raise SystemExit(main())
