"""`lowlat train export`: a save of a run as a model folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; it must not exist.")],
    step: Annotated[
        int | None,
        typer.Option(help="The save of this step; by default the latest.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Stored numbers: bf16, fp16, fp32 or fp8.")] = "bf16",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the updates of a LoRA run, in peft's layout.")
    ] = False,
) -> None:
    """Write a save in the Hugging Face layout, which `lowlat chat` and other programs load."""
    from lowlat.train.run.export import export_adapter, export_save
    from lowlat.utils.progress import make_progress

    progress = make_progress()
    if adapter:
        done = export_adapter(run, dst, step=step, progress=progress)
        print(f"{dst}: the adapter after {done} steps")
        return
    done = export_save(run, dst, step=step, dtype=dtype, progress=progress)
    print(f"{dst}: the model after {done} steps in {dtype}")
