"""
offload.py - a model larger than the memory: its layers stay on disk until their turn, for many questions at once.

Needs   torch, safetensors, and llava_min.py with its files beside it.
Use     model = load("FOLDER", torch.float32)              instead of llava_min.load
        results = together(model, ask, questions)          ask(question) is any code that loops over the layers
Matches the model in memory, to the bit on a CPU in float32  (tests/test_offload.py)

Every experiment loops over `decoder.layers`. Here that is a `Layers`: each turn of the loop gets a block whose weights
were just read from the checkpoint, in the file's dtype, and turned into the model's. Memory holds two blocks: the one
that computes, and the next one, which a thread reads meanwhile.

Reading a layer can take longer than a question spends in it. So questions go through the layers together: the loop over
layers is outside, the questions are inside, and each layer is read once for all of them. Time runs to the right:

    question 1      o           o           o                each o is the question's computation in one layer
    question 2        o           o           o
    question 3          o           o           o
    reads a layer   1111111     2222222     3333333          while the questions compute in the layer before

Each question runs in a thread of its own, in code that knows nothing of the others. `together` lets one thread run at a
time, until it asks for the next layer. The residual streams and caches of all questions would fill the memory again; a
`Shelf` keeps them in a temporary file.
"""
import ctypes
import json
import math
import os
import queue
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

import llava_min
import vicuna

LIBC, M_ARENA_MAX = ctypes.CDLL(None) if os.name == "posix" else None, -8

# safetensors' names of dtypes; others are quantized weights, which load_into refuses.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- files

class Tensors:
    """The tensors of a checkpoint's files, read one by one, without a memory map: what is mapped counts as memory, and
    a file that shrinks while it is mapped ends the process."""

    def __init__(self, files):
        """ValueError: a file is damaged."""
        self.places, self.stats = {}, {}                            # name -> where it is; file -> its size and time
        self.buffer = torch.empty(0, dtype=torch.uint8)             # of `copy`
        for file in files:
            self.stats[file] = stat(file)
            names = set(vicuna.stored(file))                        # ValueError, if the file is damaged
            if not str(file).endswith(".safetensors"):              # a pickle, read once for all shapes
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self.places |= {name: (file, None, tensor.shape, 0) for name, tensor in tensors.items()}
                continue
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            self.places |= {name: (file, h["dtype"], tuple(h["shape"]), 8 + size + h["data_offsets"][0])
                            for name, h in header.items() if name in names}

    def read(self, name, into=torch.empty):
        """-> the tensor, in the file's dtype. into(shape, dtype=...): the memory it is read into. ValueError: the file
        was changed or removed since it was opened."""
        file, dtype, shape, start = self.places[name]
        if stat(file) != self.stats[file]:
            raise ValueError(f"{file} was changed or removed while its layers were in use; start again")
        if dtype not in DTYPES:
            return vicuna.stored(file, name)
        tensor = into(shape, dtype=DTYPES[dtype])
        with open(file, "rb", buffering=0) as f:
            f.seek(start)
            fill(f, tensor, file)
        return tensor

    def copy(self, name, slot):
        """The tensor, into `slot`, in its dtype; by way of memory that is kept, since fresh pages take time."""
        def kept(shape, dtype):
            size = math.prod(shape) * dtype.itemsize
            if len(self.buffer) < size:
                self.buffer = torch.empty(size, dtype=torch.uint8)
            return self.buffer[:size].view(dtype).view(shape)
        slot.copy_(self.read(name, kept))

    def bytes(self, itemsize=None):
        """Memory of all tensors, with numbers of `itemsize` bytes (the files' own)."""
        return sum(math.prod(shape) * (itemsize or DTYPES.get(dtype, torch.float16).itemsize)
                   for _, dtype, shape, _ in self.places.values())


def stat(file):
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def fill(f, tensor, name):
    """Read a contiguous tensor's bytes from an open file. ValueError: the file ends before."""
    view = memoryview(tensor.flatten().view(torch.uint8).numpy())
    while len(view):
        n = f.readinto(view)
        if not n:
            raise ValueError(f"{name} ends in the middle of a tensor")
        view = view[n:]


class Shelf:
    """A list of tensors, or of [keys, values], that lie in a temporary file until they are asked for.

    Items are appended, and read by their index. Keys and values may grow: what is set must begin with what was there
    (see LLaVA.decode), and only the rest is kept in memory.
    """

    def __init__(self):
        self.file, self.places, self.more = tempfile.TemporaryFile(buffering=0), [], {}        # noqa: SIM115

    def append(self, item):
        places = []
        for tensor in item if isinstance(item, list) else [item]:
            at = self.file.seek(0, os.SEEK_END)
            data = memoryview(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
            try:
                while len(data):
                    data = data[self.file.write(data):]
            except OSError as e:
                raise OSError(e.errno, e.strerror, f"temporary files in {tempfile.gettempdir()}") from e
            places.append((at, tensor.shape, tensor.dtype, tensor.device))
        self.places.append((isinstance(item, list), places))

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        several, places = self.places[i]
        tensors = []
        for at, shape, dtype, device in places:
            tensor = torch.empty(shape, dtype=dtype)
            self.file.seek(at)
            fill(self.file, tensor, "a temporary file")
            tensors.append(tensor.to(device))
        if i in self.more:
            tensors = [torch.cat(pair, 2) for pair in zip(tensors, self.more[i], strict=True)]
        return tensors if several else tensors[0]

    def __setitem__(self, i, cache):
        places = self.places[i][1]                                  # (at, shape (B, K, S, D), dtype, device) of both
        self.more[i] = [t[:, :, shape[2]:].clone() for t, (_, shape, *_) in zip(cache, places, strict=True)]

    def copy(self):
        """Another list of the same items, which grows by itself."""
        other = Shelf.__new__(Shelf)
        other.file, other.places, other.more = self.file, self.places, dict(self.more)
        return other


def give_back():
    """Return free memory to the system: glibc keeps what was freed between pieces that are in use."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


# ---------------------------------------------------------------------------------------------------- layers

class Layers(nn.Module):
    """A decoder's layers, whose weights are elsewhere until their turn; iterate over it as over a list of blocks."""

    def __init__(self, blocks, tensors, names, memory):
        """blocks: two, on the device. names: for each layer {parameter: its name in `tensors`}. memory: keep what the
        files hold in host memory, in their dtype."""
        super().__init__()
        self.blocks, self.tensors, self.names = tuple(blocks), tensors, names      # a tuple: not this module's children
        self.held = [{p: tensors.read(name) for p, name in layer.items()} for layer in names] if memory else None
        self.session, self.sound, self.here = None, set(), threading.local()

    def waited(self):
        """Seconds that the calling thread has waited for layers, or while other questions computed."""
        return getattr(self.here, "waited", 0.0)

    def wait(self, get):
        """get(), which waits for a layer."""
        start = time.perf_counter()
        try:
            return get()
        finally:
            self.here.waited = self.waited() + time.perf_counter() - start

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Layer i alone, read for this call; valid until the next one is asked for."""
        return self.fetch(range(len(self))[i])

    def __iter__(self):
        """Yield one block after the other. A block is valid until the one after the next is asked for."""
        if self.session and self.session.mine():
            for i in range(len(self)):
                yield self.session.wait_for(i)
            return
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.fetch, 0)
            for i in range(len(self)):
                block = self.wait(coming.result)
                if i + 1 < len(self):
                    coming = pool.submit(self.fetch, i + 1)
                yield block

    @torch.inference_mode()
    def fetch(self, i):
        """Layer i's weights, into the block of its turn -> the block. ValueError: they are not finite, or changed."""
        block = self.blocks[i % 2]
        for parameter, slot in block.named_parameters():
            name = self.names[i][parameter]
            if self.held:
                slot.copy_(self.held[i][parameter])
            else:
                self.tensors.copy(name, slot)
            if i not in self.sound and not slot.sum(dtype=torch.float32).isfinite() and not slot.isfinite().all():
                raise ValueError(f"{name}: it holds NaN or infinity, or values that are too large for {slot.dtype}")
        self.sound.add(i)
        give_back()
        return block


class RestingTower(nn.Module):
    """A vision tower whose weights lie in a temporary file while it is not called."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.shelf = tower, Shelf()
        for slot in tower.parameters():
            self.shelf.append(slot.data)
            slot.data = slot.data.new_empty(0)

    def features(self, pixels, layer):
        for i, slot in enumerate(self.tower.parameters()):
            slot.data = self.shelf[i]
        try:
            return self.tower.features(pixels, layer)
        finally:
            for slot in self.tower.parameters():
                slot.data = slot.data.new_empty(0)
            give_back()


class RestingEmbedding(nn.Module):
    """An embedding whose table lies in a temporary file; only the rows that are asked for are read."""

    def __init__(self, embedding):
        super().__init__()
        self.shelf, table = Shelf(), embedding.weight.data
        self.row, self.device = table[0].clone(), table.device      # a clone: a view would keep the table
        for part in table.split(1000):
            self.shelf.append(part)

    def forward(self, ids):
        """ids (...) -> embeddings (..., C)."""
        rows = {}
        for i in set(ids.flatten().tolist()):
            row = torch.empty_like(self.row, device="cpu")
            self.shelf.file.seek(i * row.nbytes)                    # the parts follow each other in the file
            fill(self.shelf.file, row, "a temporary file")
            rows[i] = row
        return torch.stack([rows[i] for i in ids.flatten().tolist()]).view(*ids.shape, -1).to(self.device)


def load(files, dtype=torch.float32, device="cpu", memory=False, preprocess="llava", family=llava_min):
    """As llava_min.load, but the decoder's layers stay in the files; with `memory` in host memory, in the files' dtype.

    files: a folder or llava_min.Files. family: see llava_min.load. The streams and caches of a question go to a Shelf,
    unless `memory` is given.
    """
    def take_layers(model, files):
        """The layers of a model on torch's meta device are exchanged for a Layers -> the names that it reads itself."""
        tensors, d = Tensors(files.weights), model.decoder
        wanted = [dict.fromkeys(name for name, _ in block.named_parameters()) for block in d.layers]
        held = set()
        for name, (_, dtype_name, shape, _) in tensors.places.items():
            parts = llava_min.rename(name, model.config.decoder_file).split(".", 3)
            if parts[:2] != ["decoder", "layers"] or not parts[2].isdecimal() or int(parts[2]) >= len(wanted) or (
                    len(parts) < 4):
                continue
            i, parameter = int(parts[2]), parts[3]
            slot = dict(d.layers[i].named_parameters()).get(parameter)
            if slot is None or wanted[i][parameter]:
                continue                                            # extra: load_into says so
            if slot.shape != shape:
                raise ValueError(f"{name}: the checkpoint has {tuple(shape)}, the config wants {tuple(slot.shape)}")
            if dtype_name not in (None, *DTYPES):
                raise ValueError(f"{name} is {dtype_name}: quantized weights are not implemented here")
            wanted[i][parameter] = name
            held.add(name)
        missing = [f"decoder.layers.{i}.{p}" for i, names in enumerate(wanted) for p, name in names.items() if not name]
        if missing:
            raise ValueError(f"checkpoint does not fit: {len(missing)} parameters missing {missing[:3]}")
        blocks = [block.to_empty(device=device).eval().requires_grad_(False) for block in (d.layers[0], d.layers[-1])]
        d.layers = Layers(blocks if len(wanted) > 1 else blocks * 2, tensors, wanted, memory)
        return held
    if hasattr(LIBC, "mallopt"):                                    # glibc: memory that one thread freed serves all
        LIBC.mallopt(M_ARENA_MAX, 1)
    model = llava_min.load(files, dtype, device, preprocess=preprocess, take_layers=take_layers, family=family)
    model.waited = model.decoder.layers.waited
    if not memory:
        d, model.store = model.decoder, Shelf
        if d.lm_head.weight is not d.embed_tokens.weight:           # else it is needed as a whole, as the head
            d.embed_tokens = RestingEmbedding(d.embed_tokens)
        if model.config.vision:
            model.vision_tower = RestingTower(model.vision_tower)
    return model


# ---------------------------------------------------------------------------------------------------- together

class Stopped(BaseException):
    """Raised inside a thread that is not needed anymore."""


def together(model, do, items):
    """Call do(item) for all items, layer by layer -> for each item a function that returns its result, or raises its
    error. What is called loops over model.decoder.layers; only one of the calls runs at a time."""
    layers = model.decoder.layers
    if len(items) == 1 or not isinstance(layers, Layers):
        return [partial(do, item) for item in items]
    session = layers.session = Session(layers)
    try:
        return session.run(do, items)
    finally:
        layers.session = None


class Session:
    def __init__(self, layers):
        self.layers, self.threads = layers, {}                      # threads: of each, its queue and the item's number
        self.messages = queue.SimpleQueue()                         # (number, "layer", i) or (number, "end", function)

    def mine(self):
        return threading.get_ident() in self.threads

    def wait_for(self, i):
        """In an item's thread: stop here until layer i is there -> its block."""
        inbox, number = self.threads[threading.get_ident()]
        self.messages.put((number, "layer", i))
        block = self.layers.wait(inbox.get)
        if block is None:
            raise Stopped
        return block

    def run(self, do, items):
        inboxes, ends, waiting = [queue.SimpleQueue() for _ in items], {}, {}
        cores = torch.get_num_threads()

        def work(number, item):
            self.threads[threading.get_ident()] = inboxes[number], number
            torch.set_num_threads(cores)                            # torch keeps that for each thread
            if inboxes[number].get() is None:
                return
            try:
                result = do(item)
                self.messages.put((number, "end", lambda: result))
            except Stopped:
                pass
            except BaseException as error:                          # it is raised where the result is asked for
                self.messages.put((number, "end", thrower(error)))

        def advance(number, block):
            """Let one item's thread run until it needs another layer, or ends."""
            inboxes[number].put(block)
            _, what, value = self.messages.get()
            waiting.pop(number, None)
            (waiting if what == "layer" else ends)[number] = value
        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(items)]
        L, at = len(self.layers), -1
        try:
            for number, thread in enumerate(threads):
                thread.start()
                advance(number, True)
            with ThreadPoolExecutor(1) as pool:
                coming = {}
                while waiting:                                      # the next layer in the turn 0 .. L - 1, 0 ..
                    at = min(waiting.values(), key=lambda i: (i - at - 1) % L)
                    block = (coming.pop(at, None) or pool.submit(self.layers.fetch, at)).result()
                    if at + 1 < L:
                        coming = {at + 1: pool.submit(self.layers.fetch, at + 1)}
                    for number in [n for n, i in waiting.items() if i == at]:
                        advance(number, block)
        finally:
            for number in set(range(len(items))) - ends.keys():     # an error: let the threads end
                inboxes[number].put(None)
        return [ends[number] for number in range(len(items))]


def thrower(error):
    def throw():
        raise error
    return throw
