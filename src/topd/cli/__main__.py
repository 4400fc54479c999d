"""`python -m topd.cli` is `topd`."""

from topd.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
