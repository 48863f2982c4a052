"""`python -m lowlat` is the command `lowlat`."""

import sys


def main() -> None:
    """Entry point: Ctrl-C ends the command while its modules are read, too."""
    try:
        from lowlat.cli.main import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
