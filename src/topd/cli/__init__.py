"""The commands, one file each, and the option parsing that they share."""

from topd.cli.main import main as main
