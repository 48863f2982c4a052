"""lowlat in one process of a torchrun launch, which writes its id: ranked.py FOLDER ARGUMENT...

Forks of a test cannot be told apart by what /proc has of them.
"""

import os
import sys
from pathlib import Path

from lowlat.cli.main import run

if __name__ == "__main__":
    folder = sys.argv.pop(1)
    rank = os.environ["RANK"]
    new = Path(folder, f".{rank}")
    new.write_text(f"{os.getpid()}")
    new.replace(Path(folder, rank))
    run()
