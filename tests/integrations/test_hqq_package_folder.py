"""qmodel.pt is a zip file with checksums, which torch.load does not look at."""

import shutil
import zipfile
from pathlib import Path

import pytest
from golden.models import FILES

import peft_quantlayers as pql
from peft_quantlayers.formats.checksums import SWITCH


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FILES / "hqq_package_folder", tmp_path / "model"))


def test_one_flipped_bit_is_refused(folder, monkeypatch):
    file = folder / "qmodel.pt"
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        place = largest.header_offset + 30 + len(largest.filename) + 2048  # of local headers; padding is shorter
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"qmodel\.pt is damaged.*checksum.*save it again"):
        pql.load_hqq_folder(folder)
    monkeypatch.setenv(SWITCH, "1")
    pql.load_hqq_folder(folder)


def test_what_is_no_pickle_is_refused_by_name(folder):
    (folder / "qmodel.pt").write_text("root:x:0:0:root:/root:/bin/bash\n" * 5)
    with pytest.raises(ValueError, match=r"qmodel\.pt"):
        pql.load_hqq_folder(folder)
