"""Causal attention within documents: neither a [T, T] mask nor the products that it would hide exist.

In half precision on a GPU, one call of FlashAttention's kernel for variable lengths runs all documents, with a window
or without. Elsewhere a document is one causal call of PyTorch's kernel; with a window, or a soft cap, its queries run
in blocks, each against the blocks of keys that it can see. (On GPUs, flex attention would compile a soft cap, too.)
"""

# Shapes: B batch, T queries, S keys, H query heads, G key and value heads (each serves R = H / G query heads in a row),
# d channels of a query or key, e of a value.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moray.model.attention.documents import Documents

QUERY_BLOCK = 128
"""Queries whose soft-capped scores exist at the same time; the least that a window's blocks hold."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CHANNELS = 256
"""The widest head that the kernel takes; widths are multiples of 8."""


@dataclass(frozen=True)
class Scoring:
    """What a query and a key make of each other.

    scale: what their product is multiplied with. window: a token sees itself and the window - 1 tokens before it.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, section 2).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(
    q_BTHd: Tensor,
    k_BTGd: Tensor,
    v_BTGe: Tensor,
    scoring: Scoring,
    documents: Documents | None = None,
) -> Tensor:
    """Causal attention in which no token sees another document; None: each row is one. Shapes: -> [B, T, H, e]."""
    if documents and documents.edges is not None and _suits_flash(q_BTHd, v_BTGe, scoring):
        return _attend_documents(q_BTHd, k_BTGd, v_BTGe, scoring, documents.edges, _longest(q_BTHd, documents))
    lengths = documents and documents.lengths
    if lengths is None:
        return _attend_document(q_BTHd, k_BTGd, v_BTGe, scoring)
    pieces = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BTHd, k_BTGd, v_BTGe)), strict=True)
    outputs = [_attend_document(q[None], k[None], v[None], scoring)[0] for q, k, v in pieces]
    return torch.cat(outputs).unflatten(0, q_BTHd.shape[:2])


def attend_visible(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, scoring: Scoring, visible: Tensor | None) -> Tensor:
    """Attention of a few queries to the keys that each may see: [T, S] or [B, 1, T, S], None for all; at least one.

    The window is not looked at: it is in `visible`. Shapes: -> [B, H, T, e].
    """
    if scoring.softcap is None:
        return _kernel(q_BHTd, k_BGSd, v_BGSe, scoring.scale, visible=visible)
    blocks = q_BHTd.split(QUERY_BLOCK, dim=2)
    masks = [None] * len(blocks) if visible is None else visible.split(QUERY_BLOCK, dim=-2)
    outputs = [
        _softcapped(q, k_BGSd, v_BGSe, scoring.scale, scoring.softcap, mask)
        for q, mask in zip(blocks, masks, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def sees(query_T: Tensor, key_S: Tensor, window: int | None) -> Tensor:
    """Whether the token at one place sees the token at another, [T, S]."""
    distance_TS = query_T[:, None] - key_S
    behind_TS = distance_TS >= 0
    return behind_TS if window is None else behind_TS & (distance_TS < window)


def _suits_flash(q_BTHd: Tensor, v_BTGe: Tensor, scoring: Scoring) -> bool:
    is_narrow = max(q_BTHd.shape[-1], v_BTGe.shape[-1]) <= FLASH_CHANNELS
    return q_BTHd.is_cuda and q_BTHd.dtype in FLASH_DTYPES and scoring.softcap is None and is_narrow


def _longest(q_BTHd: Tensor, documents: Documents) -> int:
    """Tokens of no document are more. In a compiled graph, a bound that is the same for all batches."""
    row = q_BTHd.shape[1]
    return row if torch.compiler.is_compiling() or documents.lengths is None else max(documents.lengths)


def _attend_documents(
    q_BTHd: Tensor, k_BTGd: Tensor, v_BTGe: Tensor, scoring: Scoring, edges: Tensor, longest: int
) -> Tensor:
    # Imported here because it imports torch's compiler, a second of every start.
    from torch.nn.attention.varlen import varlen_attn

    width, value_width = q_BTHd.shape[-1], v_BTGe.shape[-1]
    wanted = 8 * math.ceil(max(width, value_width) / 8)
    q, k, v = (_widened(x.flatten(0, 1), wanted) for x in (q_BTHd, k_BTGd, v_BTGe))
    reach = -1 if scoring.window is None else scoring.window - 1  # keys behind a query; -1 is all of them
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, edges, edges, longest, longest, scale=scoring.scale, window_size=(reach, 0), enable_gqa=grouped
    )
    assert isinstance(out, Tensor)  # alone, since nothing beside it was asked for
    return out[..., :value_width].unflatten(0, q_BTHd.shape[:2])


def _attend_document(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGe: Tensor, scoring: Scoring) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTGd, v_BTGe))
    fits = scoring.window is None or q.shape[2] <= scoring.window
    if fits and scoring.softcap is None:
        out = _kernel(q, k, v, scoring.scale, causal=True)
    else:
        out = _attend_in_blocks(q, k, v, scoring)
    return out.transpose(1, 2)


def _attend_in_blocks(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTe: Tensor, scoring: Scoring) -> Tensor:
    """Work and memory grow with T * (window + block), or without a window with T^2 / 2 but a block's at a time."""
    window = scoring.window
    width = QUERY_BLOCK if window is None or scoring.softcap else max(window, QUERY_BLOCK)
    reach = q_BHTd.shape[2] if window is None else math.ceil((window - 1) / width)
    # Split and joined again rather than sliced: the gradient of a slice is as long as the whole.
    queries, keys, values = (x.split(width, dim=2) for x in (q_BHTd, k_BGTd, v_BGTe))
    places = torch.arange(q_BHTd.shape[2], device=q_BHTd.device).split(width)

    def block(i: int) -> Tensor:
        seen = slice(max(0, i - reach), i + 1)
        visible_TS = sees(places[i], torch.cat(places[seen]), window)
        return attend_visible(queries[i], _join(keys[seen]), _join(values[seen]), scoring, visible_TS)

    if scoring.softcap is None:
        outputs = [block(i) for i in range(len(queries))]
    else:
        # Scores are computed again in the backward pass, or all blocks' would be kept until then.
        outputs = [checkpoint(block, i, use_reentrant=False, preserve_rng_state=False) for i in range(len(queries))]
    return torch.cat(outputs, dim=2)


def _join(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(tuple(blocks), dim=2)


def _kernel(
    q_BHTd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, scale: float, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    d, e = q_BHTd.shape[-1], v_BGSe.shape[-1]
    # The fused kernels want values as wide as keys; zeros cost less than the scores that the plain one would keep.
    q, k, v = (_widened(x, max(d, e)) for x in (q_BHTd, k_BGSd, v_BGSe))
    grouped = q.shape[1] != k.shape[1]
    if grouped and visible is not None and q.is_cuda:
        # CUDA's only fused kernel that takes a mask knows no groups.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out[..., :e]


def _widened(x: Tensor, width: int) -> Tensor:
    """With zeros for the channels that it lacks."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _softcapped(
    q_BHTd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, scale: float, softcap: float, visible: Tensor | None
) -> Tensor:
    n_groups, tokens = k_BGSd.shape[1], q_BHTd.shape[2]
    # The query heads of a group become rows of one product: keys and values are read once, not once a head.
    q_BGrd = (q_BHTd * (scale / softcap)).unflatten(1, (n_groups, -1)).flatten(2, 3)
    scores_BGrS = q_BGrd @ k_BGSd.transpose(-2, -1)
    accurate = torch.promote_types(scores_BGrS.dtype, torch.float32)
    scores_BGRTS = softcap * scores_BGrS.to(accurate).tanh().unflatten(2, (-1, tokens))
    if visible is not None:
        scores_BGRTS = scores_BGRTS.masked_fill(~visible.unsqueeze(-3), -torch.inf)
    weights_BGrS = scores_BGRTS.softmax(-1).to(v_BGSe.dtype).flatten(2, 3)
    return (weights_BGrS @ v_BGSe).unflatten(2, (-1, tokens)).flatten(1, 2)
