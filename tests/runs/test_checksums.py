from __future__ import annotations

from pathlib import Path

import pytest

from postlude.errors import CheckpointError
from postlude.runs.checksums import SUMS, check_sums, hash_file, listed_sums, write_sums


def test_files_are_compared_with_their_checksums(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_text(f"what {file.name} holds")
    check_sums(files)  # there are none
    assert listed_sums(files) == {}
    write_sums(tmp_path)
    lines = (tmp_path / SUMS).read_text().splitlines()
    assert lines == [f"{hash_file(file)}  {file.name}" for file in files]
    check_sums(files)
    files[1].write_text("something else")
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged: .*SHA256SUMS"):
        check_sums(files)
    # A list of somebody else that does not know the file says nothing of it.
    (tmp_path / SUMS).write_text("# by hand\n" + "0" * 64 + " *README.md\n")
    check_sums(files)
