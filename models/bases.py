"""The frozen networks of a teacher: in memory once, on the device when they are needed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.files import UserError
from models.parallel import blocks_of


class Bases:
    """bases(e) is the teacher's expert e, ready to be called; loaded when it is first asked for.

    offload   none    it stays on the device
              expert  it lives in pinned host memory, but for the one that was asked for last
              blocks  it lives there but for what is not in blocks; of these one computes on the
                      device while the next is on its way (class Blocks)
    A recorded forward must be backpropagated before another expert is asked for.
    """

    def __init__(self, load: Callable[[int], nn.Module], device, offload: str = "none"):
        self.load, self.device, self.offload = load, torch.device(device), offload
        self.networks: dict[int, nn.Module] = {}
        self.host: dict[int, dict[str, Tensor]] = {}  # of those that live there
        self.here = 0  # the expert on the device, with offload expert

    def __call__(self, e: int) -> nn.Module:
        if e not in self.networks:
            self._load(e)
        if self.offload == "expert" and e != self.here:
            self._leave()
            for name, p in frozen(self.networks[e]).items():
                p.data = to_device(self.host[e][name], self.device)
            self.here = e
        return self.networks[e]

    def _load(self, e: int) -> None:
        net = self.load(e)
        if self.offload == "none":
            net.to(self.device)
        if self.offload == "expert":
            pinned = Pinned(self.device)
            self.host[e] = {name: pinned.take(p) for name, p in frozen(net).items()}
        if self.offload == "blocks":
            Blocks(net, self.device)
        self.networks[e] = net

    def _leave(self) -> None:
        """Give up the device's copy: the host still has the same numbers."""
        if self.here:
            for name, p in frozen(self.networks[self.here]).items():
                p.data = self.host[self.here][name]
        self.here = 0


class Blocks:
    """Streams the blocks of a frozen network: each arrives while the one before it computes.

    Two buffers on the device take turns. A block's buffer is free again when all work that was
    queued before the next block began is done, its backward too: autograd finishes a block before
    it recomputes the one below. Needs activation checkpointing wherever there is a gradient: else
    a graph would hold every block.
    """

    def __init__(self, net: nn.Module, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.parameters = [list(frozen(block).values()) for block in blocks_of(net)]
        pinned = Pinned(device)
        self.host = [[pinned.take(p) for p in ps] for ps in self.parameters]
        streamed = {id(p) for ps in self.parameters for p in ps}
        for p in frozen(net).values():
            p.data = p.data if id(p) in streamed else p.data.to(device)
        self.buffers = [[torch.empty_like(x, device=device) for x in self.host[0]] for _ in "ab"]
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.arrived: dict[int, tuple] = {}  # block -> its buffer, and the event that ends its copy
        self.inside, self.buffer = -1, 0
        for i, block in enumerate(blocks_of(net)):
            block.register_forward_pre_hook(lambda *_, i=i: self.enter(i))

    def enter(self, i: int) -> None:
        """Before block i computes: bring it in, and send for the one after it."""
        down = self.inside == i + 1 or (self.inside == i and i > 0)  # backward goes down
        if i != self.inside:
            if i not in self.arrived:
                self.fetch(i)
            buffer, event = self.arrived.pop(i)
            if self.cuda:
                torch.cuda.current_stream().wait_event(event)
            self.leave()
            for p, x in zip(self.parameters[i], self.buffers[buffer]):
                p.data = x
            self.inside, self.buffer = i, buffer
        after = self.next_of(i, down)
        if after not in self.arrived:
            self.fetch(after)

    def next_of(self, i: int, down: bool) -> int:
        """The block to come: at the top a recorded forward turns round, another starts over."""
        top = len(self.parameters) - 1
        if down:
            return i - 1 if i else min(1, top)
        return i + 1 if i < top else (max(0, top - 1) if torch.is_grad_enabled() else 0)

    def fetch(self, i: int) -> None:
        """Start the copy of block i into the buffer that does not compute."""
        if i == self.inside:
            return
        self.arrived.clear()  # a wrong guess
        other = 1 - self.buffer
        if not self.cuda:
            return self.arrived.update({i: (self.copy(i, other), None)})
        self.stream.wait_stream(torch.cuda.current_stream())  # for all that still reads the buffer
        with torch.cuda.stream(self.stream):
            self.arrived[i] = self.copy(i, other), self.stream.record_event()

    def copy(self, i: int, buffer: int) -> int:
        """Block i into a buffer; returns it."""
        for x, host in zip(self.buffers[buffer], self.host[i]):
            x.copy_(host, non_blocking=True)
        return buffer

    def leave(self) -> None:
        """The block inside is on the host again."""
        if self.inside >= 0:
            for p, x in zip(self.parameters[self.inside], self.host[self.inside]):
                p.data = x


def frozen(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a base, without its adapters."""
    return {name: p for name, p in net.named_parameters() if not p.requires_grad}


PIECE = 2**30  # bytes; torch rounds what it pins up to a power of two, by half for these tensors


class Pinned:
    """Host memory that the device reads at full speed, taken tensor by tensor out of few pieces."""

    def __init__(self, device: torch.device, piece: int | None = None):
        self.pin, self.left = device.type == "cuda", torch.empty(0, dtype=torch.uint8)
        self.piece = (PIECE if self.pin else 0) if piece is None else piece

    def take(self, p: nn.Parameter) -> Tensor:
        """p moves there; returns what it holds now."""
        if p.nbytes > len(self.left):
            size = max(self.piece, p.nbytes)
            try:
                self.left = torch.empty(size, dtype=torch.uint8, pin_memory=self.pin)
            except RuntimeError as error:
                raise UserError("no room to pin host memory; --dry-run says how much") from error
        place, self.left = self.left[: p.nbytes], self.left[aligned(p.nbytes) :]
        p.data = place.view(p.dtype).view(p.shape).copy_(p.data)
        return p.data


def aligned(size: int) -> int:
    """The next multiple of 512 bytes."""
    return -(-size // 512) * 512


def pieces(sizes: list[int]) -> int:
    """Bytes that Pinned allocates for tensors of these sizes."""
    total = left = 0
    for size in sizes:
        if size > left:
            left = max(PIECE, size)
            total += left
        left = max(0, left - aligned(size))
    return total


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, also where that is the host: what is tested there is what runs."""
    return torch.empty_like(x, device=device).copy_(x, non_blocking=True)
