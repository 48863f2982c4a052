"""Machines: presets, TOML tables, clusters, and errors in one line."""

from pathlib import Path

import pytest

from lowlat.plan.serving.machines import MACHINES, parse_cluster
from lowlat.utils.errors import UserError


def test_clusters_count_servers_and_gpus():
    assert parse_cluster("4xepyc-9654").devices == 8
    assert parse_cluster("8xh100").devices == 8
    assert parse_cluster("h200").machine.memory_bandwidth == 4.8e12


def test_rates_are_published_ones_times_shares():
    machine = MACHINES["h100"]
    rates = machine.rates("fp8", decodes=False)
    assert rates.products == pytest.approx(0.6 * 1978.9e12)
    assert rates.bandwidth == pytest.approx(0.8 * 3.35e12)
    server = MACHINES["epyc-9654"]
    assert server.rates("fp8", decodes=True).products == pytest.approx(0.7 * 96 * 2.4e9 * 64)
    assert server.rates("fp32", decodes=True).products == pytest.approx(0.7 * 96 * 2.4e9 * 32)


def test_a_table_changes_a_preset(tmp_path: Path):
    path = tmp_path / "box.toml"
    path.write_text(
        'like = "epyc-9654"\nmemory = 384\nbandwidth = 350\nbf16 = 10\nnetwork_latency = 5'
    )
    cluster = parse_cluster(f"3x{path}")
    assert cluster.machines == 3 and cluster.machine.name == "box"
    assert cluster.machine.memory_bytes == 384 * 10**9
    assert cluster.machine.memory_bandwidth == 350e9
    assert cluster.machine.flops["bf16"] == 10e12
    assert cluster.machine.network_latency == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "like = None: name the preset"),
        ('like = ["h100"]', r"like = \['h100'\]: name the preset"),
        ('like = "abacus"', "like = 'abacus'"),
        ('like = "h100"\nwidth = 3', "unknown key width"),
        ('like = "h100"\nbandwidth = -1', "bandwidth: give a number above 0, not -1"),
        ('like = "h100"\nbandwidth = true', "bandwidth: give a number above 0, not True"),
        ('like = "h100"\nproduct_share = 1.5', "product_share: give a share of at most 1"),
        ('like = "h100"\ndevices = 1.5', "devices: give a whole number"),
        ('like = "h100"\nmemory = 1', "memory: 4 GB of it are reserved"),
        ("like = ", "is not TOML"),
    ],
)
def test_faults_of_tables_name_file_and_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "box.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^--machine {path}: {message}"):
        parse_cluster(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abacus", "'abacus' is unknown; choose one of epyc"),
        ("0xh100", "give 1 to 4096 machines"),
        ("99999xh100", "give 1 to 4096 machines"),
        pytest.param(f"00000000{'9' * 5000}xh100", "give 1 to 4096 machines", id="long number"),
        ("nowhere.toml", r"nowhere\.toml: cannot be read"),
    ],
)
def test_unknown_machines(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_cluster(text)
