"""`python -m lowlat` is the command `lowlat`."""

from lowlat.cli.main import run

if __name__ == "__main__":
    run()
