"""The GPU rows against the published tables, their own rules, and every spelling in the measured data."""

from __future__ import annotations

import csv
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pertoken.catalog.gpus import PRECISIONS, Gpu, _problems, gpu, gpus
from pertoken.errors import UnknownNameError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
NAMED_BY_ISSUE = {
    *("A10G", "A100-40GB-PCIe", "A100-40GB-SXM", "A100-80GB-PCIe", "A100-80GB-SXM", "L4", "L40S", "RTX-4090"),
    *(
        "RTX-5090",
        "RTX-6000-Ada",
        "RTX-PRO-6000-Server",
        "H100-PCIe",
        "H100-SXM",
        "H100-NVL",
        "H200-SXM",
        "GH200",
    ),
    *("B200", "B300", "GB200", "GB300", "MI300X", "MI325X", "MI355X", "Gaudi-3", "Jetson-AGX-Thor"),
    "Apple-M3-Ultra",
}

SPELLINGS = {
    "h100": "H100-SXM",
    "h100_sxm": "H100-SXM",
    "H100_SXM": "H100-SXM",
    "DGX-H100": "H100-SXM",
    "NVIDIA H100-SXM5-80GB": "H100-SXM",
    "NVIDIA H100 80GB HBM3": "H100-SXM",
    "nvidia-h100-mega-80gb": "H100-SXM",
    "H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "H100-NVL-94GB": "H100-NVL",
    "h200_sxm": "H200-SXM",
    "NVIDIA H200": "H200-SXM",
    "NVIDIA H200 NVL": "H200-NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA GH200-GraceHopper-Superchip_96GB": "GH200",
    "NVIDIA H200-SXM-141GB-CTS": "H200-SXM",
    "AMD Instinct MI300X-NPS1-SPX-192GB-750W": "MI300X",
    "b200": "B200",
    "DGX-B200": "B200",
    "NVIDIA B200-SXM-180GB": "B200",
    "NVIDIA Blackwell GPU (B200-SXM-180GB)": "B200",
    "NVIDIA Blackwell Ultra GPU (B300-SXM-270GB)": "B300",
    "NVIDIA B300 SXM6": "B300",
    "NVIDIA Blackwell GPU (GB200)": "GB200",
    "GB200 NVL72": "GB200",
    "gb300": "GB300",
    "mi355x": "MI355X",
    "AMD Instinct MI355X": "MI355X",
    "MI300X OAM": "MI300X",
    "AMD Instinct MI300X 192GB HBM3": "MI300X",
    "AMD Instinct MI325X 256GB HBM3E DLC": "MI325X",
    "a100_80gb": "A100-80GB-SXM",
    "a100_sxm": "A100-80GB-SXM",
    "a100_pcie": "A100-80GB-PCIe",
    "NVIDIA A100-SXM4-80GB": "A100-80GB-SXM",
    "NVIDIA A100-SXM4-40GB": "A100-40GB-SXM",
    "NVIDIA A100 80GB PCIe": "A100-80GB-PCIe",
    "NVIDIA A100-PCIE-40GB": "A100-40GB-PCIe",
    "nvidia-tesla-a100": "A100-40GB-SXM",
    "a10g": "A10G",
    "L4": "L4",
    "nvidia-l40s": "L40S",
    "RTX A6000": "RTX-A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000-Ada",
    "RTX6000-Ada": "RTX-6000-Ada",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "rtx_pro_6000_server": "RTX-PRO-6000-Server",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000-Server",
    "Intel Gaudi 3": "Gaudi-3",
    "NVIDIA Jetson AGX Thor": "Jetson-AGX-Thor",
    "M3 Ultra": "Apple-M3-Ultra",
    "mi300x-amds": "MI300X",
    "h200-cw": "H200-SXM",
    "b200-nvd": "B200",
    "gb300-nv": "GB300",
    "NVIDIA GB300-288GB": "GB300",
    "NVIDIA B300 SXM6 AC": "B300",
    "HGX B300 NVL16": "B300",
    "NVIDIA GH200 Grace Hopper Superchip": "GH200",
    "NVIDIA GH200-GraceHopper-Superchip_144GB": "GH200-144GB",
    "NVIDIA H20": "H20",
    "H20-3e": "H20-141GB",
    "NVIDIA H800": "H800-SXM",
    "NVIDIA A800-SXM4-80GB": "A800-80GB-SXM",
    "Tesla V100-SXM2-32GB": "V100-32GB-SXM",
    "Tesla T4": "T4",
    "L40S-PCIe-48GB": "L40S",
    "RTX 6000 Pro Blackwell Server Edition": "RTX-PRO-6000-Server",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX-PRO-6000-Workstation",
    "DGX Spark": "GB10",
    "AMD Instinct MI250X": "MI250X",
    "Gaudi 2": "Gaudi-2",
    "tpu-v5e": "TPU-v5e",
    "Google TPU v6e Trillium": "TPU-v6e",
    "Ironwood": "TPU-v7",
    "AWS Trainium2": "Trainium2",
    "trn2": "Trainium2",
}

REFUSED = [
    "",
    "nvidia",
    "80gb",
    "a100",
    "A100 20GB",
    "h100 96gb",
    "GH200 200GB",
    "M3",
    "rtx 6000",
    "B100",
    "H20 80GB",
    "H800 PCIe",
    "V100",
    "DGX A100",
    "8xH100",
    "RTX PRO 6000 Max-Q",
    "TPU v6e-8",
    "MI308X",
]


def test_every_gpu_the_product_promises_is_there() -> None:
    assert len(gpus()) >= 24
    assert set(gpus()) >= NAMED_BY_ISSUE


@pytest.mark.parametrize("row", gpus().values(), ids=lambda row: row.name)
def test_row_keeps_the_rules(row: Gpu) -> None:
    assert list(_problems(row)) == []
    assert set(row.flops) <= set(PRECISIONS)
    assert len(row.sources) >= 2
    assert all(len(text) > 10 for text in row.power_notes.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flops": {"bf16": 1e15, "fp8": 0.9e15}}, "fp8 is slower than bf16"),
        ({"flops": {"fp8": 1e15}}, "no bf16"),
        ({"flops": {"bf16": 1e15, "fp7": 1e15}}, "unknown precision"),
        ({"memory_bytes_per_s": -1.0}, "memory_bytes_per_s is -1.0, not positive"),
        ({"tdp_w": float("nan")}, "tdp_w is nan"),
        ({"idle_w": 700.0}, "idle_w is not below tdp_w"),
        ({"host_idle_w": 900.0}, "host_idle_w"),
        ({"memory_gb": 160.0}, "memory_mib does not fit"),
        ({"inter_node_bytes_per_s": 1e12}, "link inside the node"),
        ({"scale_up_gpus": 4}, "scale_up_gpus"),
        ({"sources": ("one",)}, "fewer than two sources"),
        ({"checked": "yesterday"}, "not a date"),
        ({"power_notes": {"idle_w": "about that"}}, "no basis"),
    ],
)
def test_a_broken_row_is_named(change: dict[str, Any], says: str) -> None:
    broken = replace(gpu("H100-SXM"), **change)
    assert any(says in problem for problem in _problems(broken))


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS.items())
def test_spelling(spelling: str, name: str) -> None:
    assert gpu(spelling).name == name


@pytest.mark.parametrize("row", gpus().values(), ids=lambda row: row.name)
def test_own_name_in_any_case_and_punctuation(row: Gpu) -> None:
    for spelling in (
        row.name,
        row.name.lower(),
        row.name.replace("-", "_").upper(),
        row.name.replace("-", " "),
    ):
        assert gpu(spelling) is row


@pytest.mark.parametrize("name", REFUSED)
def test_no_guess(name: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        gpu(name)
    assert "\n" not in str(error.value)


def test_ambiguous_name_lists_what_it_could_be() -> None:
    with pytest.raises(UnknownNameError) as error:
        gpu("A100")
    assert set(error.value.nearest) <= {name for name in gpus() if name.startswith("A100-")}
    assert len(error.value.nearest) == 3


def test_rows_can_be_hashed_compared_and_sent_to_another_process() -> None:
    row = gpu("B200")
    assert pickle.loads(pickle.dumps(row)) == row
    assert len({row, gpu("b200"), gpu("h100")}) == 2
    assert asdict(row)["flops"]["fp8"] == 4.5e15


def test_sparse_and_pairwise_numbers_are_not_sold_as_one_dense_gpu() -> None:
    tera = {name: {p: rate / 1e12 for p, rate in row.flops.items()} for name, row in gpus().items()}
    assert tera["H100-PCIe"]["bf16"] == 756
    assert tera["L40S"] == {"bf16": 362.05, "fp8": 733, "int8": 733}
    assert tera["RTX-4090"]["bf16"] == 165.2
    assert tera["B200"] == {"bf16": 2250, "fp8": 4500, "fp4": 9000, "int8": 4500}
    assert tera["GB200"] == {"bf16": 2500, "fp8": 5000, "fp4": 10000, "int8": 5000}
    assert tera["B300"]["fp4"] == pytest.approx(6 * tera["B300"]["bf16"])  # Blackwell Ultra's dense FP4
    assert tera["GB300"]["fp4"] == pytest.approx(6 * tera["GB300"]["bf16"])
    assert tera["B300"]["int8"] < 200
    assert tera["MI355X"]["fp4"] == pytest.approx(4 * tera["MI355X"]["bf16"], rel=1e-4)
    assert gpu("H100-NVL").memory_gb == 94  # 188 GB is the pair
    assert gpu("GH200").scale_up_gpus == 1  # NVLink-C2C reaches the CPU, not another GPU
    assert gpu("GB200").scale_up_gpus == 72


# aiconfigurator's value divided by ours where they differ by more than 2 %, and why.
KNOWN_TO_DIFFER = {
    ("b200_sxm", "inter_node"): "DGX B200 has 400 Gb/s per GPU; they assume 800",
    ("b300_sxm", "fp4"): "they carry the datasheet's 14 PF, rounded from 13.5",
    ("gb200", "inter_node"): "theirs is NVLink within the rack; ours is InfiniBand out of it",
    ("l4", "inter_node"): "cloud and edge servers with L4 have 100 Gb/s; they assume 200",
    ("l40s", "inter_node"): "they assume 400 Gb/s per card; common servers share fewer",
    ("rtx_pro_6000_server", "memory_bw"): "theirs is the Workstation Edition's memory clock",
    ("l4", "memory"): "they count 24 GiB; with ECC the driver shows 22.5",
}
SYSTEMS = sorted((SHARED / "gpu_specs").glob("*.yaml"))


@pytest.mark.skipif(not SYSTEMS, reason="../shared/data/gpu_specs is absent")
def test_against_aiconfigurator() -> None:
    differ = {}
    for path in SYSTEMS:
        theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
        chip, node = theirs["gpu"], theirs["node"]
        row = gpu(path.stem)
        pairs = {
            "memory_bw": (row.memory_bytes_per_s, chip["mem_bw"]),
            "memory": (row.memory_bytes, chip["mem_capacity"]),
            "tdp": (row.tdp_w, chip["power"]),
            "intra_node": (row.intra_node_bytes_per_s, node["intra_node_bw"]),
            "inter_node": (row.inter_node_bytes_per_s, node["inter_node_bw"]),
            **{
                ours: (row.flops.get(ours, 0.0), chip[f"{name}_tc_flops"])
                for ours, name in (("bf16", "bfloat16"), ("fp8", "fp8"), ("fp4", "fp4"), ("int8", "int8"))
                if f"{name}_tc_flops" in chip
            },
        }
        for what, (ours, published) in pairs.items():
            if ours != pytest.approx(published, rel=0.02):
                differ[path.stem, what] = (ours, published)
    assert set(differ) == set(KNOWN_TO_DIFFER), differ


EPOCH = SHARED / "gpu_specs" / "epoch_ml_hardware_2025-12.csv"
EPOCH_NAMES = {
    "NVIDIA A10 PCIe": "A10",
    "NVIDIA A100 SXM4 40 GB": "A100-40GB-SXM",
    "NVIDIA A100 SXM4 80 GB": "A100-80GB-SXM",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA GeForce RTX 3090": "RTX-3090",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000-Ada",
    "NVIDIA A10G": "A10G",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H100 SXM5 80GB": "H100-SXM",
    "NVIDIA H200 SXM": "H200-SXM",
    "NVIDIA GH200": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA B300 (Blackwell Ultra)": "B300",
    "NVIDIA GB200": "GB200",
    "NVIDIA GB300 (Blackwell Ultra)": "GB300",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI325X": "MI325X",
    "AMD Instinct MI350X": "MI350X",
    "AMD Instinct MI355X": "MI355X",
    "Intel Habana Gaudi3": "Gaudi-3",
    "NVIDIA Tesla T4": "T4",
    "NVIDIA Tesla V100 SXM2 16 GB": "V100-16GB-SXM",
    "NVIDIA Tesla V100 SXM2 32 GB": "V100-32GB-SXM",
    "NVIDIA A40 PCIe": "A40",
    "NVIDIA RTX A5000": "RTX-A5000",
    "NVIDIA A800 PCIe 80 GB": "A800-80GB-PCIe",
    "NVIDIA A800 SXM": "A800-80GB-SXM",
    "NVIDIA L20 PCle": "L20",
    "NVIDIA HGX H20": "H20",
    "NVIDIA H800 SXM5": "H800-SXM",
    "AMD Radeon Instinct MI250X": "MI250X",
    "Intel Habana Gaudi2": "Gaudi-2",
    "Google TPU v5e": "TPU-v5e",
    "Google TPU v5p": "TPU-v5p",
    "Google TPU v6e Trillium": "TPU-v6e",
    "Google TPU v7 Ironwood": "TPU-v7",
    "Amazon Trainium2": "Trainium2",
}
EPOCH_COLUMNS = {
    "bf16": "Tensor-FP16/BF16 performance (FLOP/s)",
    "fp8": "FP8 performance (FLOP/s)",
    "fp4": "FP4 performance (FLOP/s)",
    "int8": "INT8 performance (OP/s)",
    "memory_gb": "Memory size per board (Byte)",
    "memory_bw": "Memory bandwidth (byte/s)",
    "tdp": "TDP (W)",
}
EPOCH_DIFFERS = {
    ("RTX-4090", "bf16"): "theirs accumulates in 16 bits",
    ("MI355X", "fp8"): "theirs is the MI350X",
    ("MI355X", "fp4"): "theirs is the MI350X",
    ("B300", "fp4"): "their FP4 column rounds 13.5 to 14 PF",
    ("B300", "int8"): "157.5 by Epoch, 153.5 by aiconfigurator and NVIDIA's 307 TOPS sparse",
    ("GB300", "memory_gb"): "theirs is the raw 288 GB stack",
    ("Gaudi-3", "bf16"): "theirs is an early sheet of the PCIe card",
    ("Gaudi-3", "fp8"): "theirs is an early sheet of the PCIe card",
    ("A10G", "tdp"): "theirs is the A10's",
    ("GH200", "memory_bw"): "theirs is the 144 GB HBM3e variant",
    ("A800-80GB-PCIe", "tdp"): "theirs is the 40 GB card's",
    ("MI250X", "tdp"): "theirs is the typical power, ours the peak",
    ("Gaudi-2", "bf16"): "theirs is an early estimate",
}


@pytest.mark.skipif(not EPOCH.exists(), reason="../shared/data/gpu_specs is absent")
def test_against_epoch() -> None:
    with EPOCH.open(encoding="utf-8", newline="") as file:
        table = {entry["Hardware name"]: entry for entry in csv.DictReader(file)}
    differ = {}
    compared = 0
    for theirs, ours in EPOCH_NAMES.items():
        row = gpu(ours)
        values = {
            **row.flops,
            "memory_gb": row.memory_gb * 1e9,
            "memory_bw": row.memory_bytes_per_s,
            "tdp": row.tdp_w,
        }
        for what, column in EPOCH_COLUMNS.items():
            text = table[theirs][column]
            if not text or what not in values:
                continue
            compared += 1
            if values[what] != pytest.approx(float(text), rel=0.02):
                differ[ours, what] = (values[what], float(text))
    assert compared > 100
    assert set(differ) == set(EPOCH_DIFFERS), differ


MEASURED = sorted((SHARED / "performance").glob("*.csv"))


@pytest.mark.skipif(not MEASURED, reason="../shared/data/performance is absent")
def test_every_gpu_of_the_measured_data_resolves() -> None:
    spellings = set()
    for path in MEASURED:
        with path.open(encoding="utf-8", newline="") as file:
            spellings |= {entry["gpu"] for entry in csv.DictReader(file)}
    assert len(spellings) > 15
    assert {gpu(spelling).name for spelling in spellings} <= set(gpus())
