"""`lowlat train export`: export a training checkpoint as a model folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist.")],
    step: Annotated[
        int | None,
        typer.Option(help="Step of the checkpoint, by default the latest.", show_default=False),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number type to store: bf16, fp16, fp32 or fp8.")
    ] = "bf16",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA adapter, in peft's layout.")
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder, which lowlat chat and other programs load."""
    from lowlat.train.run.export import export_adapter, export_save
    from lowlat.utils.progress import make_progress

    progress = make_progress()
    if adapter:
        done = export_adapter(run, dst, step=step, progress=progress)
        print(f"{dst}: the adapter after {done} steps")
        return
    done = export_save(run, dst, step=step, dtype=dtype, progress=progress)
    print(f"{dst}: the model after {done} steps in {dtype}")
