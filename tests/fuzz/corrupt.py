"""Damages of weight files. Each takes a folder and a generator, and says what it did; None if it does not apply."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from golden.files import tensors_of
from safetensors import safe_open
from safetensors.torch import save_file

Damage = Callable[[Path, random.Random], str | None]


def weights_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))


def _header_length(file: Path) -> int:
    """Of a safetensors file; of another file none."""
    data = file.read_bytes()
    return 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else 0


def _change_bytes(folder: Path, rng: random.Random, change: Callable[[bytearray, int], None]) -> str:
    """``change`` gets the file's bytes and a place in its data."""
    file = rng.choice(weights_in(folder))
    data = bytearray(file.read_bytes())
    place = rng.randrange(_header_length(file), len(data))
    change(data, place)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def flip_a_bit(folder: Path, rng: random.Random) -> str:
    def flip(data: bytearray, place: int) -> None:
        data[place] ^= 1 << rng.randrange(8)

    return _change_bytes(folder, rng, flip)


def flip_a_bit_of_the_header(folder: Path, rng: random.Random) -> str | None:
    file = rng.choice(weights_in(folder))
    length = _header_length(file)
    if not length:
        return None
    data = bytearray(file.read_bytes())
    place = rng.randrange(length)
    data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def zero_a_run(folder: Path, rng: random.Random) -> str:
    def zero(data: bytearray, place: int) -> None:
        length = len(data[place : place + rng.randrange(1, 4096)])
        data[place : place + length] = bytes(length)

    return _change_bytes(folder, rng, zero)


def fill_a_run(folder: Path, rng: random.Random) -> str:
    def fill(data: bytearray, place: int) -> None:
        length = len(data[place : place + rng.randrange(1, 4096)])
        data[place : place + length] = rng.randbytes(length)

    return _change_bytes(folder, rng, fill)


def copy_a_page(folder: Path, rng: random.Random) -> str:
    def copy(data: bytearray, place: int) -> None:
        start = rng.randrange(0, len(data))
        page = bytes(data[start : start + 512])[: len(data) - place]
        data[place : place + len(page)] = page

    return _change_bytes(folder, rng, copy)


def cut_off(folder: Path, rng: random.Random) -> str:
    file = rng.choice(weights_in(folder))
    length = rng.randrange(0, file.stat().st_size)
    file.write_bytes(file.read_bytes()[:length])
    return f"{file.name} at {length}"


def append(folder: Path, rng: random.Random) -> str:
    file = rng.choice(weights_in(folder))
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 100)))
    return file.name


def something_else_in_its_place(folder: Path, rng: random.Random) -> str:
    file = rng.choice(weights_in(folder))
    file.unlink()
    what = rng.choice(["nothing", "empty", "folder", "pipe", "link to itself", "device"])
    if what == "empty":
        file.touch()
    elif what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "link to itself":
        file.symlink_to(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    return f"{file.name}: {what}"


def _rewrite(
    folder: Path, rng: random.Random, change: Callable[[dict[str, torch.Tensor], str], str | None]
) -> str | None:
    """``change`` gets the tensors of a file and the name of one; the header keeps its metadata."""
    files = [file for file in weights_in(folder) if file.suffix == ".safetensors"]
    if not files:
        return None
    file = rng.choice(files)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = tensors_of(file)
    name = rng.choice(sorted(tensors))
    said = change(tensors, name)
    if said is not None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=metadata)
        said = f"{file.name}: {name} {said}"
    return said


def delete_a_tensor(folder: Path, rng: random.Random) -> str | None:
    return _rewrite(folder, rng, lambda tensors, name: "deleted" if tensors.pop(name) is not None else None)


def rename_a_tensor(folder: Path, rng: random.Random) -> str | None:
    def rename(tensors: dict[str, torch.Tensor], name: str) -> str:
        new = rng.choice([name + "s", name.replace("0", "1"), name[1:], "x." + name]) or "x"
        tensors[new] = tensors.pop(name)
        return f"to {new}"

    return _rewrite(folder, rng, rename)


def add_a_tensor(folder: Path, rng: random.Random) -> str | None:
    def add(tensors: dict[str, torch.Tensor], name: str) -> str:
        new = f"{name.rpartition('.')[0]}.{rng.choice(['W_q', 'codes', 'weight', 'extra'])}"
        if new in tensors:
            new += "_2"
        tensors[new] = torch.ones(4)
        return f"and {new}"

    return _rewrite(folder, rng, add)


def swap_two_tensors(folder: Path, rng: random.Random) -> str | None:
    def swap(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        same = [
            key
            for key, value in tensors.items()
            if key != name and value.shape == tensors[name].shape and value.dtype == tensors[name].dtype
        ]
        if not same or torch.equal(tensors[name], tensors[same[0]]):
            return None
        tensors[name], tensors[same[0]] = tensors[same[0]], tensors[name]
        return f"for {same[0]}"

    return _rewrite(folder, rng, swap)


def cast_a_tensor(folder: Path, rng: random.Random) -> str | None:
    def cast(tensors: dict[str, torch.Tensor], name: str) -> str:
        dtype = rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
        tensors[name] = tensors[name].to(dtype)
        return f"to {dtype}"

    return _rewrite(folder, rng, cast)


def reshape_a_tensor(folder: Path, rng: random.Random) -> str | None:
    def reshape(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensor = tensors[name]
        shapes = [tensor[None], tensor.flatten(), tensor.flatten()[1:], tensor.T if tensor.dim() == 2 else tensor]
        tensors[name] = rng.choice(shapes).clone()
        return f"from {tuple(tensor.shape)} to {tuple(tensors[name].shape)}"

    return _rewrite(folder, rng, reshape)


def write_a_number(folder: Path, rng: random.Random) -> str | None:
    def write(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        if not tensors[name].is_floating_point() or not tensors[name].numel():
            return None
        value = rng.choice([torch.nan, torch.inf, -torch.inf, -0.0, 1e4, -1.0, 0.0])
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
        return f"has {value}"

    return _rewrite(folder, rng, write)


def mix_shards(folder: Path, rng: random.Random) -> str | None:
    """A shard of another save, of another number, or named wrongly in the index."""
    files, index = weights_in(folder), folder / "model.safetensors.index.json"
    if len(files) < 2 or not index.exists():
        return None
    first, second = rng.sample(files, 2)
    what = rng.choice(["of another save", "exchanged", "twice", "in the index"])
    if what == "of another save":
        shutil.copy(folder.parent.parent / "subjects" / "another" / first.name, first)
    elif what == "exchanged":
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    elif what == "twice":
        shutil.copy(first, second)
    else:
        fields = json.loads(index.read_text())
        name = rng.choice(sorted(fields["weight_map"]))
        fields["weight_map"][name] = rng.choice([second.name, "absent.safetensors", "../x.safetensors", "/dev/zero"])
        index.write_text(json.dumps(fields))
    return f"{first.name} and {second.name} {what}"


# Those that change values only, which nothing but a checksum notices.
VALUES: tuple[Damage, ...] = (
    flip_a_bit, zero_a_run, fill_a_run, copy_a_page, swap_two_tensors, write_a_number,
)  # fmt: skip
OTHERS: tuple[Damage, ...] = (
    flip_a_bit_of_the_header, cut_off, append, something_else_in_its_place, delete_a_tensor, rename_a_tensor,
    add_a_tensor, cast_a_tensor, reshape_a_tensor, mix_shards,
)  # fmt: skip
