"""Muon: momentum made orthogonal, matrix by matrix, of weights that are spread over ranks.

A matrix of which one rank holds all (an expert, as a rule) is worked on there. Of every other, one rank gathers the
momentum, and gives each holder its part of the result: with P ranks, each sends and receives twice what it holds of
them, and computes 1 / P, where gathering all of them everywhere would send P / 2 times as much and compute all.
Source: Jordan et al., 2024; rates by which AdamW's fit, too: Liu et al., 2025 (Moonlight), section 2.2.
"""

# Shapes: N matrices of R rows and C columns, a stacked weight [E, R, C] being E of them.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moray.model.sharded import local
from moray.parallel.chunks import Chunk
from moray.parallel.held import held_chunk

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that Newton-Schulz iterates: they bring singular values near 1 fast, and not exactly there."""
ITERATIONS = 5
LIKE_ADAMW = 0.2
"""The root mean square of AdamW's updates."""
STACK = 64
"""Matrices of one shape that a GPU works on at a time."""


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, but for singular values of 0.7 to 1.2; one of zeros stays so. Shape: [N, R, C]."""
    a, b, c = COEFFICIENTS
    x = x_NRC.mT if x_NRC.shape[1] > x_NRC.shape[2] else x_NRC
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if x_NRC.shape[1] > x_NRC.shape[2] else x


def is_matrix(name: str, weight: nn.Parameter) -> bool:
    """Whether Muon is for it: maps from hidden states to hidden states, not tables of tokens, taps or biases."""
    modules = name.split(".")
    outside = {"embedding", "position_embedding", "head", "conv"} & {*modules}
    return weight.ndim > 1 and not outside and "bias" not in modules[-1] and min(weight.shape[-2:]) > 1


@dataclass(frozen=True)
class _Piece:
    """What a rank holds of a matrix: of parameter `parameter`, or of the matrix `index` that is stacked in it."""

    rank: int
    parameter: int
    index: int
    rows: slice
    columns: slice
    owner: int

    @property
    def elements(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class SpreadMatrices:
    """Weights that are matrices, or stacks of them, spread over a process group that together holds each element once.

    Collective; without a `group`, this process holds all.
    """

    def __init__(self, weights: Sequence[nn.Parameter], group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        """`dtype`: in which momentum travels and products are computed."""
        self._group, self._dtype, self._device = group, dtype, local(weights[0]).device
        self._rank, self._size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._shapes = [weight.shape[-2:] for weight in weights]
        own = [held_chunk(weight) for weight in weights]
        held: list[Any] = [own]
        if group:
            held = [None] * self._size
            dist.all_gather_object(held, own, group)
        self._origins = [offsets for offsets, _ in own]
        self._pieces = _shared_out([_pieces_of(i, shape, held) for i, shape in enumerate(self._shapes)], self._shapes)

    @torch.no_grad()
    def orthogonalise(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Of each weight what this rank holds of it -> what it holds of the orthogonal matrices, in `dtype`."""
        sent = [piece for piece in self._pieces if piece.rank == self._rank]
        owned = [piece for piece in self._pieces if piece.owner == self._rank]
        found = [torch.empty_like(x, dtype=self._dtype) for x in held]
        gathered = self._exchange(sent, [self._part(held, piece).to(self._dtype) for piece in sent], owned)
        made = self._make(owned, gathered)
        for piece, part in zip(sent, self._exchange(owned, made, sent, is_back=True), strict=True):
            self._part(found, piece).copy_(part)
        return found

    def _part(self, held: Sequence[Tensor], piece: _Piece) -> Tensor:
        """This rank's rows and columns of the piece's matrix."""
        x = held[piece.parameter]
        return x[piece.index - self._origins[piece.parameter][0]] if x.ndim > 2 else x

    def _exchange(
        self, sent: list[_Piece], parts: list[Tensor], received: list[_Piece], *, is_back: bool = False
    ) -> list[Tensor]:
        """Pieces to their owners, or back to their holders: those of `received`, in that order."""
        there, here = ("rank", "owner") if is_back else ("owner", "rank")
        shapes = [(p.rows.stop - p.rows.start, p.columns.stop - p.columns.start) for p in received]
        if self._group is None:
            return parts
        to = sorted(range(len(sent)), key=lambda i: getattr(sent[i], there))
        of = sorted(range(len(received)), key=lambda i: getattr(received[i], here))
        out = [sum(p.elements for p in sent if getattr(p, there) == rank) for rank in range(self._size)]
        coming = [sum(p.elements for p in received if getattr(p, here) == rank) for rank in range(self._size)]
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)  # a rank that has none takes part all the same
        leaving = torch.cat([nothing, *(parts[i].flatten() for i in to)])
        arriving = leaving.new_empty(sum(coming))
        dist.all_to_all_single(arriving, leaving, coming, out, group=self._group)
        pieces = dict(zip(of, arriving.split([received[i].elements for i in of]), strict=True))
        return [pieces[i].view(shape) for i, shape in enumerate(shapes)]

    def _make(self, owned: list[_Piece], parts: list[Tensor]) -> list[Tensor]:
        """The pieces of the matrices that this rank makes of all their pieces."""
        matrices: dict[tuple[int, int], Tensor] = {}
        for piece, part in zip(owned, parts, strict=True):
            if (piece.parameter, piece.index) not in matrices:
                matrices[piece.parameter, piece.index] = part.new_empty(self._shapes[piece.parameter])
            matrices[piece.parameter, piece.index][piece.rows, piece.columns] = part
        # One by one, each is what it is on any layout, to the last bit; on a GPU that would take too many kernels.
        stack = STACK if any(part.is_cuda for part in parts) else 1
        for shape in sorted({self._shapes[parameter] for parameter, _ in matrices}):
            same = [key for key in matrices if self._shapes[key[0]] == shape]
            for some in (same[start : start + stack] for start in range(0, len(same), stack)):
                made = orthogonalise(torch.stack([matrices[key] for key in some]))
                matrices.update(zip(some, made, strict=True))
        return [matrices[piece.parameter, piece.index][piece.rows, piece.columns] for piece in owned]


def _pieces_of(parameter: int, shape: torch.Size, held: list[list[Chunk]]) -> list[list[_Piece]]:
    """Of each matrix of a weight, the pieces that ranks hold, without an owner yet."""
    matrices: dict[int, list[_Piece]] = {}
    for rank, chunks in enumerate(held):
        offsets, sizes = chunks[parameter]
        rows, columns = (slice(o, o + n) for o, n in zip(offsets[-2:], sizes[-2:], strict=True))
        stacked = range(offsets[0], offsets[0] + sizes[0]) if len(offsets) > 2 else range(1)
        for index in stacked:
            if sizes[-2] and sizes[-1]:
                matrices.setdefault(index, []).append(_Piece(rank, parameter, index, rows, columns, rank))
    return [matrices[index] for index in sorted(matrices)]


def _shared_out(weights: list[list[list[_Piece]]], shapes: list[torch.Size]) -> list[_Piece]:
    """All pieces with their owners: a matrix in one piece is its holder's, the others go to who has least work."""
    work: dict[int, float] = {}
    spread: list[list[_Piece]] = []
    found: list[_Piece] = []
    for matrix in (matrix for weight in weights for matrix in weight):
        if len(matrix) == 1:
            found += matrix
            work[matrix[0].rank] = work.get(matrix[0].rank, 0.0) + _work(shapes[matrix[0].parameter])
        else:
            spread.append(matrix)
    for matrix in sorted(spread, key=lambda matrix: -_work(shapes[matrix[0].parameter])):
        owner = min((piece.rank for piece in matrix), key=lambda rank: (work.get(rank, 0.0), rank))
        work[owner] = work.get(owner, 0.0) + _work(shapes[matrix[0].parameter])
        found += [_Piece(p.rank, p.parameter, p.index, p.rows, p.columns, owner) for p in matrix]
    return found


def _work(shape: torch.Size) -> float:
    return float(shape[0] * shape[1] * min(shape))


class Muon:
    """Moves matrices by their momentum, made orthogonal."""

    def __init__(
        self, weights: Sequence[nn.Parameter], momentum: float, group: dist.ProcessGroup | None, dtype: torch.dtype
    ) -> None:
        self._weights, self._momentum = weights, momentum
        self._spread = SpreadMatrices(weights, group, dtype)

    @torch.no_grad()
    def step(self, momenta: Sequence[Tensor], rates: Sequence[float], decays: Sequence[float]) -> None:
        """One step by the weights' gradients; `momenta` are theirs, and change. Collective."""
        gradients = [local(weight.grad) for weight in self._weights if weight.grad is not None]
        held = [local(momentum) for momentum in momenta]
        torch._foreach_lerp_(held, gradients, 1 - self._momentum)
        # Nesterov's: where the momentum is about to be.
        looked_ahead = torch._foreach_lerp(gradients, held, self._momentum)
        for weight, made, rate, decay in zip(
            self._weights, self._spread.orthogonalise(looked_ahead), rates, decays, strict=True
        ):
            x = local(weight)
            x.mul_(1 - rate * decay)
            x.add_(made.to(x.dtype), alpha=-rate * LIKE_ADAMW * max(weight.shape[-2:]) ** 0.5)
