"""A conversion's report for the command line to print."""

from pathlib import Path

from lowlat.convert.report import ConversionReport


def conversion(source: Path, destination: Path) -> ConversionReport:
    return ConversionReport(
        source=source,
        destination=destination,
        attention_before="GQA",
        attention_after="MLA",
        cache_bytes_per_token_before=1234,
        cache_bytes_per_token_after=567,
        cache_bytes_per_token_int8=345,
        parameters_before=89,
        parameters_after=98,
        weight_bytes_before=5_000_000,
        weight_bytes_after=20_000_000,
        bits_per_weight_before=4.5,
        bits_per_weight_after=16.0,
        experts=None,
        seconds=1.5,
    )
