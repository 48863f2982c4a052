"""Merge trained attention weights into a checkpoint whose other weights stay unchanged."""

import shutil
from pathlib import Path

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.save import files_of_source, write_checkpoint
from lowlat.convert.conversion import is_attention
from lowlat.train.run.export import export_save
from lowlat.utils.progress import Progress


def write_recovered(run: Path, start: Path, recovered: Path, progress: Progress) -> None:
    """Write the model `start` with the attention that was trained in the folder `run`, in fp32, as
    `recovered`. Other weights are those of `start`, because the trainer may store frozen weights in
    fewer bits.
    """
    trained = recovered.with_name("trained")
    shutil.rmtree(trained, ignore_errors=True)
    export_save(run, trained, step=None, dtype="fp32", progress=progress)
    before, after = open_checkpoint(start), open_checkpoint(trained)
    sources = ((name, after if is_attention(name) else before) for name in before.names())
    tensors = ((name, source.read(name)) for name, source in sources)
    write_checkpoint(recovered, before.hf_config, tensors, extra_files=files_of_source(start))
    shutil.rmtree(trained)
