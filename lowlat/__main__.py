"""Entry point of `python -m lowlat`: the `lowlat` command."""

import sys


def main() -> None:
    """Run the command; Ctrl-C also ends it while modules are imported."""
    try:
        from lowlat.cli.main import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
