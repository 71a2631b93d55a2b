"""Which errors speak of a full disk, and whether there is one."""

import errno
import tempfile

import pytest

from peft_quantlayers.storage import is_full, says_full


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a file"), True),
        (OSError(errno.EDQUOT, "of any words"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (Exception("No space left on device (os error 28)"), True),  # of the package tokenizers
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), False),  # of torch
        (ValueError("no space"), False),
        (None, False),
    ],
)
def test_errors_speak_of_a_full_disk_by_number_or_in_the_words_of_the_system(error, expected):
    assert says_full(error) is expected
    outer = RuntimeError("not written")
    outer.__context__ = error
    assert says_full(outer) is expected


def test_a_circle_of_errors_has_an_end():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert not says_full(first)


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_a_disk_is_full_where_a_small_file_cannot_be_written(number, expected, tmp_path, monkeypatch):
    assert not is_full(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []

    class Full:
        def __init__(self, dir):
            assert dir == tmp_path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, content):
            raise OSError(number, "of the system")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    assert is_full(tmp_path / "not" / "there") is expected
