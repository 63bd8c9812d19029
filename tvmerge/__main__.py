"""`python -m tvmerge`."""

from tvmerge.cli import entry

entry()
