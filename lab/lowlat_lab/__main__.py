"""`python -m lowlat_lab`."""

from lowlat_lab.cli.main import run

if __name__ == "__main__":
    run()
