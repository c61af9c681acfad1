"""Images decoded once: resized pixels in one memory-mapped file for each folder, shared by all processes of a node.

A file is of one folder's images at one size, and its name is a digest of all that its bytes depend on: the files with
their sizes and times, the side, and the versions that decode and resize. So train, validation and test parts, seeds and
runs share it. It appears under that name whole or not at all. Labels are not in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from framework.datamodules.decoding import read_pixels, unreadable
from framework.datamodules.folders import ImageFiles
from framework.errors import ConfigurationError
from framework.reports import logger

Storage = Literal["none", "memory", "disk"]
SHARE_OF_MEMORY = 0.8  # of what is free: the run needs some too
SUFFIX = ".pixels"


class ImageCache:
    """The resized images of a folder by their place in the sorted list, uint8 ``[3, side, side]`` each.

    In the file the channels are innermost: so decoders give them, and so resizing takes them best.

    Attributes:
        pixels: all of them, an array ``[N, 3, side, side]``, in the file itself: to be read only.

    Opening it finds the file or writes it; of several processes one writes, and the others wait for it. Files in memory
    are removed when the last process that has them open ends or lets go of them; what a killed process leaves behind,
    the next one uses or removes.

    Args:
        paths: the image files of one folder.
        side: height and width that they are resized to, in pixels.
        storage: ``memory`` or ``disk``.
        folder: where ``disk`` keeps its files; default: ``transfer-framework`` in the user's folder of caches.

    Raises:
        ConfigurationError: there is too little room, the folder cannot be written, or an image cannot be read.
    """

    def __init__(self, paths: Sequence[str], side: int, storage: Storage, folder: str | None = None) -> None:
        self.paths, self.side = sorted(paths), side
        self.rows = {path: row for row, path in enumerate(self.paths)}
        self.file = _cache_file(self.paths, side, storage, folder)
        if storage == "disk" and self._whole():  # nobody removes it; the folder may be closed to us
            self._map()
            return
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.file.with_suffix(".lock")) as alone:
                if alone:
                    _sweep(self.file, storage)
                if not self._whole():
                    self._write(storage)
                self._map()
                if storage == "memory":
                    self._share()
        except OSError as error:
            raise ConfigurationError(
                f"Expected `--data.cache {storage}` to find a folder that can be written, but '{self.file.parent}' "
                f"cannot: {error.strerror or error}. Take another `--data.cache_dir`, or `--data.cache none`."
            ) from error

    @staticmethod
    def exists(paths: Sequence[str], side: int, storage: Storage, folder: str | None = None) -> bool:
        """Whether these images are there already."""
        file = _cache_file(sorted(paths), side, storage, folder)
        return file.exists() and file.stat().st_size == len(paths) * 3 * side**2

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """A copy of image ``index``, uint8 ``[3, side, side]``."""
        return torch.from_numpy(self.pixels[index].copy(order="K"))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.paths) * 3 * self.side**2

    def _whole(self) -> bool:
        return self.file.exists() and self.file.stat().st_size == self.size

    def _map(self) -> None:
        with self.file.open("rb") as file:
            # shared, and not written to: the pages are the same ones in every process
            content = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody may write to it
            rows = torch.frombuffer(content, dtype=torch.uint8)
        self.pixels = rows.view(len(self.paths), self.side, self.side, 3).permute(0, 3, 1, 2).numpy()

    # ------------------------------------------------------------------ writing
    def _write(self, storage: Storage) -> None:
        self._check_room(storage)
        logger.info(
            f"Decoding {len(self.paths):,} images to {self.side} px for `--data.cache {storage}`: {_size(self.size)} "
            f"in '{self.file.parent}' …"
        )
        number, name = tempfile.mkstemp(suffix=".partial", prefix=f"{self.file.stem}.", dir=self.file.parent)
        try:
            with os.fdopen(number, "wb") as file:
                _reserve(file.fileno(), self.size)
                self._decode(file)
                os.fsync(file.fileno())  # the pixels before the name, if the power fails
            if not self._whole():  # another writer's, where there are no locks: then that one is used
                Path(name).replace(self.file)
        finally:
            Path(name).unlink(missing_ok=True)

    def _decode(self, file: IO[bytes]) -> None:
        resize = v2.Resize((self.side, self.side))

        def decode(first: int) -> None:
            for row in range(first, min(first + 32, len(self.paths))):
                pixels = resize(read_pixels(self.paths[row])).permute(1, 2, 0).contiguous().numpy()
                if os.pwrite(file.fileno(), memoryview(pixels).cast("B"), row * pixels.size) != pixels.size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
        try:
            jobs = [pool.submit(decode, first) for first in range(0, len(self.paths), 32)]
            for job in jobs:
                job.result()
        finally:  # after an error, or Ctrl-C, without the rest
            pool.shutdown(cancel_futures=True)

    def _check_room(self, storage: Storage) -> None:
        free, place = shutil.disk_usage(self.file.parent).free, f"in '{self.file.parent}'"
        if storage == "memory":
            free, place = int(SHARE_OF_MEMORY * min(free, *_free_memory())), f"of memory {place}"
        if self.size > free:
            other = "`--data.cache disk`" if storage == "memory" else "a `--data.cache_dir` with more room"
            raise ConfigurationError(
                f"Expected `--data.cache {storage}` to have room for {len(self.paths):,} images of {self.side} px, "
                f"{_size(self.size)}, but only {_size(free)} {place} can be used. Take {other}, a smaller "
                "`--data.image_size`, or `--data.cache none`."
            )

    # ------------------------------------------------------------------ the end of a file in memory
    def _share(self) -> None:
        """Hold the file until this object or its process ends; a shared lock on it says that it is in use."""
        user = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        _flock(user, "LOCK_SH")
        self._release = weakref.finalize(self, _let_go, user, self.file, os.getpid())

    def __getstate__(self) -> dict[str, Any]:  # to a worker process that is not a fork
        return {name: value for name, value in vars(self).items() if name not in ("pixels", "_release")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


class CachedImages:
    """The cached images of one part of the data, whose files may be of several folders.

    Args:
        files: the images, of which image ``i`` is ``files.paths[i]``.
        caches: one for each of ``files.roots``.
    """

    def __init__(self, files: ImageFiles, caches: Sequence[ImageCache]) -> None:
        self.caches = list(caches)
        places = [
            (domain, self.caches[domain].rows[path]) for domain, path in zip(files.domains, files.paths, strict=True)
        ]
        self.places = np.array(places, np.int64).reshape(-1, 2)  # a list would be copied in every worker

    def view(self, index: int) -> Tensor:
        """Image ``index``, uint8 ``[3, side, side]``, in the file itself: writing to it would end the process."""
        domain, row = self.places[index].tolist()
        return torch.from_numpy(self.caches[domain].pixels[row])


def _let_go(user: int, file: Path, process: int) -> None:
    if os.getpid() != process:  # a fork of the process that holds it
        return
    _flock(user, "LOCK_UN")  # for the forks too, which share this lock and have the pixels mapped
    os.close(user)
    with contextlib.suppress(OSError), _locked(file.with_suffix(".lock")) as alone:
        if alone:
            _remove_unused(file)


def _remove_unused(file: Path, unless: Path | None = None) -> None:
    """Remove a file in memory, unless a process holds it. Call it under the file's lock."""
    if file == unless:
        return
    with contextlib.suppress(OSError):
        user = os.open(file, os.O_RDONLY)
        try:
            if _flock(user, "LOCK_EX", wait=False):
                file.unlink()
        finally:
            os.close(user)


def _sweep(file: Path, storage: Storage) -> None:
    """Remove what killed processes have left: unfinished files, and in memory what nobody holds."""
    for lock in file.parent.glob("*.lock"):
        own = lock.stem == file.stem  # which we hold already
        with contextlib.nullcontext(True) if own else _locked(lock, wait=False) as alone:
            for partial in file.parent.glob(f"{lock.stem}.*.partial") if alone else ():
                partial.unlink(missing_ok=True)
            if alone and storage == "memory":
                _remove_unused(lock.with_suffix(SUFFIX), unless=file)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file's name; the system frees it when the process ends, however that is.

    Yields:
        Whether it is held: not so where the file system has no locks, or another one has it and ``wait`` is false.
    """
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        held = _flock(number, "LOCK_EX", wait=wait)
        with contextlib.suppress(FileNotFoundError):
            if not held or os.path.samestat(os.fstat(number), path.stat()):
                break
        os.close(number)  # who had it before us has removed it
    try:
        yield held
    finally:
        if held and not path.with_suffix(SUFFIX).exists():
            path.unlink(missing_ok=True)
        os.close(number)


def _flock(number: int, kind: str, wait: bool = True) -> bool:
    try:
        import fcntl  # not on every system

        fcntl.flock(number, getattr(fcntl, kind) | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _reserve(number: int, size: int) -> None:
    """Take the room now, so that a lack of it does not show at the end."""
    try:
        os.posix_fallocate(number, 0, size)
    except AttributeError:  # not on every system
        pass
    except OSError as error:  # nor on every file system
        if error.errno == errno.ENOSPC:
            raise


def _cache_file(paths: Sequence[str], side: int, storage: Storage, folder: str | None) -> Path:
    """The file of these images: its name says all that its bytes depend on."""
    # versions and the processor's instructions: they decide on the pixels to the last bit
    versions = torch.__version__, torchvision.__version__, PIL.__version__, torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(repr((2, side, *versions)).encode())
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 (a folder may have a million files)
        except OSError as error:
            raise unreadable(path, error) from error
        entry = os.path.abspath(path), status.st_size, status.st_mtime_ns  # noqa: PTH100
        digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    where = _memory_folder() if storage == "memory" else _disk_folder(folder)
    return where / (digest.hexdigest()[:32] + SUFFIX)


def _memory_folder() -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"transfer-framework-{os.getuid()}"


def _disk_folder(folder: str | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transfer-framework"


def _free_memory() -> list[int]:
    """Bytes that can still be used: of the machine, and of the group of processes that a container or job is."""
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError, StopIteration):  # no limit is the word max
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
            lines = Path(folder, "memory.stat").read_text().splitlines()
            # pages of files that were read count as used, but make room when it is needed
            free.append(left + int(next(line for line in lines if line.startswith("inactive_file ")).split()[1]))
    return free


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"
