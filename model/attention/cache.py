"""What decoding remembers of the tokens it has seen, so that each new one costs one token's pass."""

# Shapes: B batch, T new tokens, S tokens that they may see, G key and value heads, d channels of a head, F hidden width
# of a feed-forward network.

import torch
from torch import Tensor

from moray import UserError
from moray.model.attention.sdpa import sees
from moray.model.config.architecture import ModelConfig


class Rolling:
    """The newest `room` tokens of a sequence: token t lies in slot t % room of memory taken once."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.slots: list[Tensor] = []

    def extend(self, start: int, new: list[Tensor], like: Tensor) -> list[Tensor]:
        """Stores tokens start … start + T - 1, of each tensor [B, G, T, d].

        Returns them behind those before them that they may see, in the order that `tokens` says: [B, G, S, d].
        """
        if not self.slots:
            # As wide as what comes: under tensor parallelism, a rank has fewer heads than the config says.
            self.slots = [like.new_empty(x.shape[0], x.shape[1], self.room, x.shape[3]) for x in new]
        return [self._extend(slots, start, x) for slots, x in zip(self.slots, new, strict=True)]

    def _extend(self, slots_BGRd: Tensor, start: int, new_BGTd: Tensor) -> Tensor:
        new = new_BGTd.shape[2]
        end = start + new
        if end <= self.room:
            slots_BGRd[:, :, start:end] = new_BGTd
            return slots_BGRd[:, :, :end]
        if new == 1:
            slots_BGRd[:, :, start % self.room] = new_BGTd[:, :, 0]
            return slots_BGRd
        before_S = self.tokens(start, new, slots_BGRd.device)[:-new]
        all_BGSd = torch.cat((slots_BGRd[:, :, before_S % self.room], new_BGTd), dim=2)
        kept_T = torch.arange(max(start, end - self.room), end, device=slots_BGRd.device)
        slots_BGRd[:, :, kept_T % self.room] = new_BGTd[:, :, -len(kept_T) :].to(slots_BGRd.dtype)
        return all_BGSd

    def tokens(self, start: int, new: int, device: torch.device) -> Tensor:
        """Which tokens of the sequence `extend` returns, [S]."""
        end = start + new
        if end <= self.room:
            return torch.arange(end, device=device)
        if new == 1:
            slot_S = torch.arange(self.room, device=device)
            return start - (start - slot_S) % self.room
        return torch.arange(max(0, start - self.room + 1), end, device=device)


class KVCache:
    """What every layer needs of the tokens seen so far.

    Keys and values of all tokens; of the last `window` tokens in local layers; in latent attention a vector of
    kv_rank + rope_dim; before a convolution (MixFFN) the last taps - 1 inputs, [B, taps - 1, F]. Rows may begin with
    padding, which later tokens do not see. A layer's memory is taken when its first tokens come.

    is_across: a pass brings one token of each row, and they lie along the token axis, [1, B].
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        """`capacity`: the longest sequence. `like`: any weight of the model; the cache has its dtype and device."""
        self.batch, self.capacity, self.like = batch, capacity, like.detach()
        windows = (config.attention.window if config.attention.is_local(i) else None for i in range(config.n_layers))
        self.layers = [Rolling(min(window or capacity, capacity)) for window in windows]
        self.length = 0
        self.padding_B: Tensor | None = None
        self.inputs: dict[int, Tensor] = {}
        self.is_across = False

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        held = [slots for layer in self.layers for slots in layer.slots]
        return sum(x.nbytes for x in (*held, *self.inputs.values()))

    def branch(self, times: int) -> None:
        """Each row becomes so many neighbouring ones, each to go on by itself: from here on a token of each at a time,
        which lie along the token axis. That is what tensor parallelism cuts, and one token would be too few.
        """
        self.batch, self.is_across = self.batch * times, True
        for layer in self.layers:
            layer.slots = [slots.repeat_interleave(times, 0) for slots in layer.slots]
        self.inputs = {layer: held.repeat_interleave(times, 0) for layer, held in self.inputs.items()}
        if self.padding_B is not None:
            self.padding_B = self.padding_B.repeat_interleave(times)

    def turned(self, x: Tensor) -> Tensor:
        """What lies along the token axis, [1, B, ...], a row each, [B, 1, ...], or back; else as it is."""
        return x.transpose(0, 1) if self.is_across else x

    def new(self, tokens_BT: Tensor) -> int:
        """How many tokens of each row a pass brings."""
        return 1 if self.is_across else tokens_BT.shape[1]

    def note_padding(self, lengths: list[int] | None, valid_BT: Tensor) -> None:
        """Notes the padding that rows of the coming pass begin with (`Documents`).

        Raises UserError where a row holds anything but padding and one document behind it.
        """
        rows, tokens = valid_BT.shape
        leading_B = (valid_BT.cumsum(1) == 0).sum(1)
        pieces = rows if lengths is None else len(lengths)
        if pieces != rows + int(((leading_B > 0) & (leading_B < tokens)).sum()):
            raise UserError(
                "documents_BT packs several documents into a row, or has padding behind one; with a cache a row is one "
                "document, with padding (-1) before it only"
            )
        if not leading_B.any():
            return
        padding_B = torch.zeros_like(leading_B) if self.padding_B is None else self.padding_B
        if (leading_B > 0).logical_and(padding_B < self.length).any():
            raise UserError(f"documents_BT has padding (-1) behind tokens of a cache that holds {self.length} already")
        self.padding_B = padding_B + leading_B

    def positions(self, new: int) -> Tensor:
        """Place in its document of each token of the coming pass, [1, T], or [B, T] where rows begin with padding."""
        place_BT = torch.arange(self.length, self.length + new, device=self.like.device)[None]
        return place_BT if self.padding_B is None else (place_BT - self.padding_B[:, None]).clamp(min=0)

    def extend(self, layer: int, *new_BGTd: Tensor) -> tuple[Tensor, ...]:
        """Stores a layer's new tokens behind the `length` known ones; returns all that they may see.

        Shapes: keys and values, or one tensor of latent vectors, [B, G, T, d] -> each [B, G, S, d], good until the next
        call for this layer. `visible` says who sees what. Raises UserError beyond `capacity` or `batch`.
        """
        rows, end = new_BGTd[0].shape[0], self.length + new_BGTd[0].shape[2]
        if rows != self.batch:
            raise UserError(f"the cache holds batch={self.batch} sequences; {rows} came")
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens; {end} were to be stored")
        return tuple(self.layers[layer].extend(self.length, list(new_BGTd), self.like))

    def visible(self, layer: int, new: int) -> Tensor | None:
        """Which of what `extend` returns each new token sees, [T, S] or [B, 1, T, S]; None: everything."""
        if new == 1 and self.padding_B is None:
            return None
        rolling = self.layers[layer]
        new_T = torch.arange(self.length, self.length + new, device=self.like.device)
        token_S = rolling.tokens(self.length, new, self.like.device)
        visible_TS = sees(new_T, token_S, rolling.room)
        if self.padding_B is None:
            return visible_TS
        # Padding sees itself, or it would have nothing to see and be NaN.
        itself_TS = new_T[:, None] == token_S
        return visible_TS & (token_S >= self.padding_B[:, None, None, None]) | itself_TS

    def convolution(self, layer: int, x_BTF: Tensor, taps: int) -> Tensor:
        """A layer's new inputs behind the taps - 1 before them (at the start, zeros); remembers the last taps - 1.

        Shapes: [B, T, F] -> [B, taps - 1 + T, F].
        """
        held = self.inputs.get(layer)
        if held is None:
            held = x_BTF.new_zeros(x_BTF.shape[0], taps - 1, x_BTF.shape[2])
        reach_BSF = torch.cat((held, x_BTF), dim=1)
        self.inputs[layer] = reach_BSF[:, x_BTF.shape[1] :].clone()  # a view would keep a whole prompt's inputs
        return reach_BSF
