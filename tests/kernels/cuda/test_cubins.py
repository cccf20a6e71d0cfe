"""What `make cubins` makes: every case once, what is missing alone, and nothing half."""

import json

import pytest

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import cubins, decode
from quantlib.kernels.cuda.compile import ARCHITECTURES
from quantlib.kernels.cuda.layout import WIDTHS


def test_all_widths_are_built_for_all_architectures():
    found = list(cubins.jobs(tuple(WIDTHS), tuple(ARCHITECTURES), ["w4a4zh8/8:512"]))
    assert len({job.file for job in found}) == len(found)
    cases = list(cubins.cases())
    assert {case.bits for case in cases} == set(WIDTHS)
    assert {case.token_tiles for case in cases} == set(decode.TOKEN_TILES)
    assert any(case.sparse for case in cases)
    assert sum(job.file.startswith("decode") for job in found) == 6 * len(cases)
    sources = {job.file.partition("-")[0] for job in found}
    assert sources == {"decode_gemm", "segmented_gemm", "rotate_quantize"}


def job(name, made):
    def make():
        made.append(name)
        if name == "wrong":
            raise BuildError("nvcc refuses it")
        return name.encode(), {"name": name}

    return cubins.Job(f"{name}.cubin", make)


def test_what_is_there_is_not_made_again(tmp_path):
    made, told = [], []
    first, second = [job(name, made) for name in "ab"], [job(name, made) for name in "bc"]
    cubins.make(tmp_path, first, told.append)
    cubins.make(tmp_path, second, told.append)
    assert sorted(made) == ["a", "b", "c"]
    (tmp_path / "b.cubin").unlink()
    cubins.make(tmp_path, first, told.append)
    assert made.count("b") == 2
    assert (tmp_path / "b.cubin").read_bytes() == b"b"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["file"] for row in summary] == ["a.cubin", "b.cubin", "c.cubin"]
    assert len(told) == 4


def test_what_was_made_before_a_failure_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cubins.os, "cpu_count", lambda: 1)
    made = []
    with pytest.raises(BuildError, match="nvcc refuses it"):
        cubins.make(tmp_path, [job("a", made), job("wrong", made), job("b", made)], made.append)
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {"name": "a", "file": "a.cubin"} in rows
    assert "wrong.cubin" not in {row["file"] for row in rows}
