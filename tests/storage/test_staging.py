"""Folders are written all at once, and what interrupts a writer costs neither the old files nor the new."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from peft_quantlayers.storage import FolderContents, is_interrupted, locked_folder, recover_folder, staged_folder

ROOT = Path(__file__).parents[2]
KIND = FolderContents(
    first_read="config.json",
    placeholder=lambda folder: {"says": f"half of {folder.name}"},
    is_replaced=lambda name: name.startswith("part"),
)
OLD = {"config.json": "{}", "part1": "old 1", "part2": "old 2", "mine.txt": "mine"}
NEW = {"config.json": '{"new": 1}', "part1": "new 1", "sub/deep": "new deep"}
AFTER = {"config.json": '{"new": 1}', "part1": "new 1", "sub/deep": "new deep", "mine.txt": "mine"}
# Begins a program: `storage` needs nothing else of the package, whose import takes seconds.
STORAGE_ALONE = f"""
import sys, types
package = sys.modules["peft_quantlayers"] = types.ModuleType("peft_quantlayers")
package.__path__ = [{str(ROOT / "peft_quantlayers")!r}]
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def save(
    folder: Path, files: dict[str, str] = NEW, *, meanwhile: Callable[[], object] = lambda: None, **kwargs: object
) -> None:
    with staged_folder(folder, KIND, **kwargs) as new:
        write(new, files)
        meanwhile()


def test_a_new_folder_has_the_files_and_nothing_is_left_beside_it(tmp_path):
    save(tmp_path / "a" / "b" / "model")
    assert read(tmp_path) == {f"a/b/model/{name}": text for name, text in NEW.items()}
    assert (tmp_path / "a" / "b" / "model").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_an_old_folder_keeps_the_files_that_are_not_replaced(tmp_path):
    folder = write(tmp_path / "model", OLD)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(folder)
    assert read(folder) == OLD
    save(folder, overwrite=True)
    assert read(tmp_path) == {f"model/{name}": text for name, text in AFTER.items()}


def test_an_empty_folder_and_a_fresh_disk_count_as_empty(tmp_path):
    (tmp_path / "model" / "lost+found").mkdir(parents=True)
    save(tmp_path / "model")
    assert read(tmp_path / "model") == NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_and_dots_mean_the_folder_that_they_lead_to(tmp_path, overwrite):
    folder = write(tmp_path / "model", OLD)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for name in ("link", "model/nope/..", "model/."):
        target = os.path.join(tmp_path, name)
        if overwrite:
            save(target, overwrite=True)
            assert read(folder) == AFTER
        else:
            with pytest.raises(FileExistsError):
                save(target)
            assert read(folder) == OLD
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_a_link_to_a_folder_that_is_not_there_yet_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "model")
    save(tmp_path / "link")
    assert read(tmp_path / "elsewhere" / "model") == NEW
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/deeper"])
def test_a_file_in_the_way_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="nothing was written"):
        save(tmp_path / name, overwrite=True)
    assert read(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("start", ["new", "empty", "old"])
def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path, start):
    folder = tmp_path / "above" / "model"
    if start != "new":
        write(folder, OLD if start == "old" else {}).mkdir(parents=True, exist_ok=True)
    before = read(tmp_path)

    def interrupted() -> None:
        with staged_folder(folder, KIND, overwrite=True) as new:
            write(new, NEW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ([] if start == "new" else ["above"])


CALLS = ("rename", "replace", "copy2", "mkdir", "write_text", "unlink")


@pytest.mark.parametrize("n_calls", range(20))
def test_an_error_at_any_moment_of_moving_leaves_the_old_files_or_the_new(tmp_path, n_calls):
    """A disk error or Ctrl-C at the n-th change of the file system; later calls work again."""
    folder, count = write(tmp_path / "model", OLD), iter(range(100))

    def failing(function):
        def call(*args, **kwargs):
            if next(count) == n_calls:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        for name in CALLS:
            owner = shutil if name == "copy2" else Path
            patch.setattr(owner, name, failing(getattr(owner, name)))
        with staged_folder(folder, KIND, overwrite=True) as new:
            for file, text in NEW.items():
                os.makedirs((new / file).parent, exist_ok=True)
                with open(new / file, "w") as opened:
                    opened.write(text)
    left = {name: text for name, text in read(tmp_path).items() if name != ".model.saving.lock"}
    assert left in (
        {f"model/{name}": text for name, text in OLD.items()},
        {f"model/{name}": text for name, text in AFTER.items()},
    )


def test_a_disk_that_fills_up_is_named_and_the_old_files_are_kept(tmp_path):
    def full():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("the tokenizer was not written") from None  # a package in words of its own

    target = tmp_path / "model"
    with pytest.raises(OSError, match=r"the disk of .*model is full; nothing was written\. Free some space") as caught:
        save(target, meanwhile=full)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    write(target, OLD)
    with pytest.raises(OSError, match=r"is full; nothing was written\. The old files are kept\."):
        save(target, meanwhile=full, overwrite=True)
    assert read(tmp_path) == {f"model/{name}": text for name, text in OLD.items()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells the names of open files here")
def test_new_files_are_on_the_disk_before_any_moves_and_the_names_at_the_end(tmp_path, monkeypatch):
    synced, at_moves, rename = [], [], Path.rename

    def recorded(self, target):
        at_moves.append(set(synced))
        return rename(self, target)

    def names_of(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", names_of)
    monkeypatch.setattr(Path, "rename", recorded)
    for folder in (tmp_path / "new", write(tmp_path / "old", OLD)):
        synced.clear()
        at_moves.clear()
        save(folder, overwrite=True)
        assert at_moves
        assert all({"config.json", "part1", "deep", "sub"} <= done for done in at_moves)
        assert synced[-1] == (folder.name if folder.name == "old" else tmp_path.name)


def test_files_that_appear_while_writing_are_not_touched(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(FileExistsError):
            save(folder, NEW, meanwhile=lambda folder=folder: write(folder, {"theirs": "theirs"}))
        assert read(folder) == {"theirs": "theirs"}


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    for folder in (tmp_path / "new", write(tmp_path / "old", OLD)):
        with staged_folder(folder, KIND, overwrite=True) as new:
            write(new, NEW)
            with pytest.raises(FileExistsError, match="another process is writing"):
                save(folder, {"config.json": "{}"}, overwrite=True)
        assert read(folder)["part1"] == "new 1"


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    program = f"""{STORAGE_ALONE}
import os, signal
from pathlib import Path
from peft_quantlayers.storage import locked_folder
with locked_folder(Path({str(tmp_path / "model")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / ".model.saving.lock").exists()
    save(tmp_path / "model")
    assert read(tmp_path) == {f"model/{name}": text for name, text in NEW.items()}


def test_leftovers_of_killed_writers_are_removed_and_other_hidden_folders_are_not(tmp_path):
    folder = write(tmp_path / "model", OLD)
    write(tmp_path / ".model.saving-0123abcd" / "new", NEW)
    write(folder / ".saving-0123abcd" / "new", NEW)
    write(tmp_path / ".model.saving-mine", {"mine": "mine"})
    write(tmp_path / ".other.saving-0123abcd", {"theirs": "theirs"})
    save(folder, overwrite=True)
    expected = {f"model/{name}": text for name, text in AFTER.items()}
    others = {".model.saving-mine/mine": "mine", ".other.saving-0123abcd/theirs": "theirs"}
    assert read(tmp_path) == expected | others


def test_a_placeholder_of_another_program_moves_nothing_out_of_the_folder(tmp_path):
    folder = write(tmp_path / "model", {"part1": "old"})
    write(tmp_path, {"precious": "mine"})
    for journal in ({"staging": "..", "files": ["precious"]}, {"staging": "x", "files": ["../precious"]}, [], "x"):
        (folder / "config.json").write_text(json.dumps({"interrupted_save": journal}))
        save(folder, overwrite=True)
        assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("link", ["staging", "old", "new"])
def test_a_placeholder_with_links_moves_nothing_from_outside(link, tmp_path):
    folder, outside = write(tmp_path / "model", {"part1": "old"}), tmp_path / "outside"
    write(outside, {"old/precious": "mine", "new/precious": "mine", "precious": "mine"})
    staging = folder / ".saving-0123abcd"
    if link == "staging":
        staging.symlink_to(outside)
    else:
        staging.mkdir()
        (staging / link).symlink_to(outside / link)
    (folder / "config.json").write_text(
        json.dumps({"interrupted_save": {"staging": staging.name, "files": ["part1"]}})
    )
    before = read(outside)
    assert not is_interrupted(folder, KIND)
    recover_folder(folder, KIND)
    assert read(outside) == before
    assert (folder / "part1").read_text() == "old"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    folder = write(tmp_path / "model", OLD)
    with pytest.raises(OSError, match="GB are free") as caught:
        save(folder, overwrite=True, n_bytes=10**18)
    assert caught.value.errno == errno.ENOSPC
    assert read(tmp_path) == {f"model/{name}": text for name, text in OLD.items()}


MOUNTS = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_staging import NEW, OLD, AFTER, read, save, write
import subprocess
base = Path({base!r})
for name, files in (("empty", {{}}), ("old", OLD)):
    folder = base / name
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    save(write(folder, files), overwrite=True)
    assert read(folder) == (AFTER if files else NEW), read(folder)
subprocess.run(["mount", "-o", "remount,ro", base / "old"], check=True)
for target in (base / "old", base / "old" / "below"):
    try:
        save(target, overwrite=True)
    except OSError as error:
        assert "nothing was written" in str(error), error
    else:
        raise AssertionError("a read-only disk was written to")
full = base / "full"
full.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", full], check=True)
write(full, OLD)
try:
    save(full, NEW | {{"part3": "x" * 2**23}}, overwrite=True)
except OSError as error:
    assert error.errno == 28, error
else:
    raise AssertionError("more was written than the disk holds")
assert read(full) == OLD, read(full)
print("done")
"""


def test_mount_points_read_only_and_full_disks(tmp_path):
    """In a mount namespace of its own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine gives no mount namespace to a user")
    program = STORAGE_ALONE + MOUNTS.format(here=str(Path(__file__).parent), base=str(tmp_path))
    command = [*unshare, sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_recovering_a_folder_without_an_interruption_does_nothing(tmp_path):
    folder = write(tmp_path / "model", OLD)
    assert not recover_folder(folder, KIND)
    assert not recover_folder(tmp_path / "absent", KIND)
    assert read(folder) == OLD


def test_a_lock_inside_is_seen_by_a_second_one(tmp_path):
    with locked_folder(tmp_path, inside=True), pytest.raises(FileExistsError), locked_folder(tmp_path, inside=True):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_files_that_safetensors_writes_for_the_owner_alone_are_read_by_whom_the_umask_lets(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with staged_folder(tmp_path / str(umask), KIND) as new:
                write(new, NEW)
                (new / "part1").chmod(0o600)
        finally:
            os.umask(before)
        files = [path for path in (tmp_path / str(umask)).rglob("*") if path.is_file()]
        assert len(files) == len(NEW)
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
