"""Step records as integers: what process 0 announces is what the others read."""

from lowlat.engine.request import Chunk
from lowlat.engine.step_record import RecordKind, StepRecord

CHUNKS = [
    Chunk(tokens=[5, 7, 11], start=64, pages=(3, 0), num_logits=2, path="expanded", lora_int_id=2),
    Chunk(tokens=[1], start=0, pages=(9,), num_logits=0, path="decode"),
]


def test_records_survive_the_way() -> None:
    for record in (
        StepRecord(kind=RecordKind.STEP, num_pages=32, chunks=CHUNKS),
        StepRecord(kind=RecordKind.MTP, num_pages=32, numbers=(1,), chunks=CHUNKS[1:]),
        StepRecord(kind=RecordKind.COPY_PAGE, num_pages=16, numbers=(4, 12)),
        StepRecord(kind=RecordKind.END),
    ):
        decoded = StepRecord.decode(record.encode())
        assert decoded.kind is record.kind and decoded.num_pages == record.num_pages
        assert decoded.numbers == record.numbers
        assert [*decoded.chunks] == [*record.chunks]
