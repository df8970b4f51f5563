"""`sequential` heads: a chain of modules that each read the previous module's state and one more token.

Module d (head d + 1) combines the state of module d - 1 at position t with the embedding of token x[t + d]:

    h_d[t] = norm(block(W [norm(h_(d-1)[t]); norm(E(x[t + d]))]))

h_d[t] is the state of module d, h_0 is the trunk's state, [a; b] is the concatenation of a and b, W is a
matrix, E is the trunk's embedding, and `block` is a decoder layer, which attends to earlier positions
(DeepSeek-V3, eq. 21-24). The shared unembedding predicts token x[t + d + 1] from h_d[t]. `Wiring` describes
how servers differ from each other in this computation.

To save memory, a module does not store its activations but runs a second time in the backward pass. Only the
inputs of the modules are stored.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.families import anatomy, body_states, layers_of, recording_cache, with_layers
from weighted_mtp_core.model.heads import Heads, SplitModel, Text
from weighted_mtp_core.model.heads.one_layer_body import one_layer_body
from weighted_mtp_core.model.sparse_feed_forward import sparse_rows
from weighted_mtp_core.recipe.schema import HeadsTable, MtpServer
from weighted_mtp_core.runtime.fsdp import copy_of


@frozen(kw_only=True)
class Wiring:
    """The points in which servers compute a chain of modules differently.

    Attributes:
        normed_trunk: Whether module 1 reads the trunk's states after the final norm.
        hidden_first: Whether the input of W is `[state; embedding]` instead of `[embedding; state]`.
        blind_start: Whether module 1 reads 0 instead of the token's embedding at the first position of a
            document.
        recurrent: Whether later modules continue the sequence of module 1. If `recurrent` is true, module d
            has the position t + d - 1 for source t, and attends to the keys and values of module 1 up to t
            and to the keys and values of modules 2..d at t. If `recurrent` is false, each module attends only
            to its own keys and values.
    """

    normed_trunk: bool
    hidden_first: bool
    blind_start: bool
    recurrent: bool


WIRINGS: dict[MtpServer, Wiring] = {
    "transformers": Wiring(normed_trunk=True, hidden_first=False, blind_start=False, recurrent=False),
    "vllm": Wiring(normed_trunk=False, hidden_first=True, blind_start=True, recurrent=True),
}


class SequentialHeads(Heads):
    """Head 1, followed by K - 1 modules, or by one module that heads 2..K share.

    Head 1 is the final norm if the modules read the states before this norm, otherwise the identity.

    Attributes:
        wiring: What a module reads, and to which keys and values the module attends.
    """

    kind = "sequential"
    chained = True
    wiring: Wiring

    @classmethod
    def split(cls, base: Any, *, n_future: int, table: HeadsTable) -> SplitModel:
        """Use the body as the trunk; each module gets a copy of the body's last layer.

        Unless `Wiring.normed_trunk` is true, the final norm is removed from the body and becomes head 1.

        Raises:
            WmtpError: The model does not consist of layers and a final norm, its last layer cannot be run
                without the other layers, or the server needs another kind of attention in this layer.
        """
        body, layers_name, norm_name = anatomy(base)
        norm, wiring = getattr(body, norm_name), WIRINGS[table.serve]
        config = with_layers(body.config, slice(-1, None))
        if wiring.recurrent and set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise WmtpError(
                f"the last layer of this `{config.model_type}` model does not attend to all earlier tokens, "
                f'as the heads of `serve = "{table.serve}"` do',
                hint='set `model.heads.serve = "transformers"`, or use another kind of heads',
            )
        width = int(base.get_output_embeddings().weight.shape[1])
        modules = [
            SequentialModule(
                one_layer_body(
                    body,
                    copy_of(getattr(body, layers_name)[-1]),
                    config=copy.deepcopy(config),
                    layers_name=layers_name,
                    norm_name=norm_name,
                ),
                norm=norm,
                width=width,
                hidden_first=wiring.hidden_first,
            )
            for _ in range(min(n_future - 1, 1) if table.shared else n_future - 1)
        ]
        if not wiring.normed_trunk:
            setattr(body, norm_name, nn.Identity())
        heads = cls([nn.Identity() if wiring.normed_trunk else norm, *modules])
        heads.wiring = wiring
        return SplitModel(trunk=body, heads=heads, norm=nn.Identity())

    def module(self, k: int) -> SequentialModule:
        """Return the module of head k (from 2)."""
        found = self[min(k, len(self)) - 1]
        assert isinstance(found, SequentialModule)
        return found

    @property
    def bodies(self) -> Sequence[nn.Module]:
        """The decoder layer of each module, as a body of one layer."""
        return [module.body for module in self if isinstance(module, SequentialModule)]

    @property
    def projections(self) -> Sequence[nn.Module]:
        """The matrix W of each module."""
        return [module.projection for module in self if isinstance(module, SequentialModule)]

    def caches(self, n_future: int) -> int:
        """Return the number of caches: at most 1 if the modules share a cache, otherwise K - 1."""
        return min(n_future - 1, 1) if self.wiring.recurrent else n_future - 1

    def layer(self, k: int) -> nn.Module:
        """Return the decoder layer of head k's module; for head 1, return head 1 itself."""
        return self[0] if k == 1 else layers_of(self.module(k).body)[0]

    def run(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        embedded_BTH: Tensor | None = None,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's states `[B, T, H]`."""
        if k == 1:
            states: Tensor = self[0](hidden_BTH)
            return states
        if embedded_BTH is None:
            raise ValueError("`sequential` heads read tokens: pass `ids_BT`")
        module = self.module(k)
        states = body_states(
            module.body,
            inputs_embeds=module.combine(hidden_BTH, embedded_BTH),
            position_BT=position_BT,
            cache=cache,
            seen_BS=seen_BS,
        )
        normed: Tensor = module.final_norm(states)
        return normed

    def each(
        self,
        hidden_BTH: Tensor,
        *,
        n_future: int,
        text: Text,
        rows: Sequence[Tensor] | None = None,
        detach: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the states `[B, T, H]` of heads 1..K; only for the last head, `rows` saves computation.

        If `detach` is true, neither the trunk nor its embedding gets a gradient from heads 2..K. Whatever the
        value of `detach`, a module gets the gradients of its own head and of all later heads.
        """
        yield self.run(1, hidden_BTH)
        if n_future == 1:
            return
        # All modules read one lookup, because each lookup would have a gradient of the size of the embedding.
        source_BTH, embedded_BTH = hidden_BTH, text.embedded()
        if detach:
            source_BTH, embedded_BTH = source_BTH.detach(), embedded_BTH.detach()
        past: Sequence[Tensor] = ()
        for k in range(2, n_future + 1):
            read = rows[k - 1] if rows is not None and k == n_future else None

            def compute(
                source_BTH: Tensor,
                embedded_BTH: Tensor,
                *past: Tensor,
                k: int = k,
                read: Tensor | None = read,
            ) -> tuple[Tensor, ...]:
                with nullcontext() if read is None else sparse_rows(self.layer(k), read):
                    return self._step(k, source_BTH, embedded_BTH, past, text=text, more=k < n_future)

            if torch.is_grad_enabled():
                found = checkpoint(compute, source_BTH, embedded_BTH, *past, use_reentrant=False)
            else:
                found = compute(source_BTH, embedded_BTH, *past)
            source_BTH, *past = found
            yield source_BTH

    def _step(
        self,
        k: int,
        source_BTH: Tensor,
        embedded_BTH: Tensor,
        past: tuple[Tensor, ...],
        *,
        text: Text,
        more: bool,
    ) -> tuple[Tensor, ...]:
        """Return head k's states and, if `Wiring.recurrent` is true, keys and values for later modules.

        Args:
            k: Number of the head, from 2.
            source_BTH: The states that the module reads.
            embedded_BTH: The embeddings of the text's tokens.
            past: The previous modules' keys and values, in the order key, value, key, value, ...
            text: The text from which the trunk computed its states.
            more: Whether another head follows.
        """
        embedded_BTH = self._blind(text.ahead(embedded_BTH, k - 1), text.positions(), k=k)
        position_BT = text.position_BT
        if not self.wiring.recurrent or not (past or more):
            return (self.run(k, source_BTH, embedded_BTH=embedded_BTH, position_BT=position_BT),)
        cache = recording_cache(past)
        states_BTH = self.run(
            k,
            source_BTH,
            embedded_BTH=embedded_BTH,
            position_BT=text.positions() + (k - 2),
            cache=cache,
            seen_BS=_continuing_mask(text.positions(), modules=k - 1, like=source_BTH),
        )
        return (states_BTH, *past, *cache.new)

    def embedded(self, trunk: Any, ids_BT: Tensor, position_BT: Tensor, *, k: int) -> Tensor:
        """Return the embeddings that head k reads for these tokens from sources at `position_BT`."""
        return self._blind(trunk.get_input_embeddings()(ids_BT), position_BT, k=k)

    def _blind(self, embedded_BTH: Tensor, position_BT: Tensor, *, k: int) -> Tensor:
        """Return the embeddings; for module 1, with 0 at the positions where it reads no embedding."""
        if not self.wiring.blind_start or k > 2:
            return embedded_BTH
        return embedded_BTH.masked_fill((position_BT == 0)[:, :, None], 0.0)

    def rejoin(self, base: Any, *, trunk: nn.Module, norm: nn.Module) -> None:
        """Make the trunk and the final norm the body of a causal LM."""
        body, _, norm_name = anatomy(base)
        super().rejoin(base, trunk=trunk, norm=norm)
        if not self.wiring.normed_trunk:
            setattr(body, norm_name, self[0])


class SequentialModule(nn.Module):
    """One module of the chain: norms, a projection and a decoder layer.

    In a new module, W is the identity for the state and 0 for the embedding, and the norms of state and
    embedding multiply by 1. The input of the copied layer is then the normalised state that the module reads.

    Args:
        body: A body of one layer.
        norm: The model's final norm, which is copied.
        width: H.
        hidden_first: `Wiring.hidden_first`.

    Attributes:
        token_norm: Norm of the embedding.
        hidden_norm: Norm of the state.
        projection: The matrix W, `[H, 2 H]`, without a bias.
        body: The decoder layer, as a body of one layer.
        final_norm: Norm before the unembedding and the next module.
    """

    def __init__(self, body: nn.Module, *, norm: nn.Module, width: int, hidden_first: bool) -> None:
        super().__init__()
        self.token_norm = _plain_copy(norm, width)
        self.hidden_norm = _plain_copy(norm, width)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.body = body
        self.final_norm = copy.deepcopy(norm)
        self.hidden_first = hidden_first
        weight = next(body.parameters())  # not of the norm, because some norms have no parameters
        self.projection.to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            parts = torch.eye(width), torch.zeros(width, width)
            self.projection.weight.copy_(torch.cat(parts if hidden_first else parts[::-1], dim=1))

    def combine(self, hidden_BTH: Tensor, embedded_BTH: Tensor) -> Tensor:
        """Return the input `[B, T, H]` of the decoder layer."""
        parts = self.hidden_norm(hidden_BTH), self.token_norm(embedded_BTH)
        combined: Tensor = self.projection(torch.cat(parts if self.hidden_first else parts[::-1], dim=-1))
        return combined


@torch.no_grad()
def _plain_copy(norm: nn.Module, width: int) -> nn.Module:
    """Return a copy of a norm that multiplies by 1; some families store the factor minus 1."""
    twin = copy.deepcopy(norm)
    parameters = list(twin.parameters())
    for parameter in parameters:
        parameter.zero_()
    if parameters and not twin(torch.arange(1.0, width + 1).to(parameters[0])[None, None]).any():
        twin.get_parameter("weight").fill_(1.0)
    return twin


def _continuing_mask(position_BT: Tensor, *, modules: int, like: Tensor) -> Tensor:
    """Return a mask `[B, 1, T, modules * T]` to add to attention scores; see `Wiring.recurrent`."""
    document_BT = (position_BT == 0).cumsum(dim=1)
    same_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    own_TT = torch.eye(position_BT.shape[1], dtype=torch.bool, device=position_BT.device)
    seen_BTS = torch.cat([same_BTT, *[own_TT.expand_as(same_BTT)] * (modules - 1)], dim=2)
    return torch.zeros_like(seen_BTS, dtype=like.dtype).masked_fill_(~seen_BTS, -torch.inf)[:, None]
