"""What training may do at random inside a layer, as the model sees it. There is no implementation here: a model that
is handed none, as every model that serves is, has nothing random about it.

Letters: N tokens, C channels, F expert size, M rows of the experts' sorted layout, A assignments of tokens to experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from model.router import Noise, Routing


class LayerChance(Protocol):
    """Chance in one layer, for the tokens of one step."""

    def jitter(self, x: Tensor) -> Tensor:
        """What the router reads instead of x (N, C)."""

    def router_noise(self, x: Tensor) -> Noise | None:
        """What is added to the router's logits for x (N, C)."""

    def drop_update(self, update: Tensor, source: str) -> Tensor:
        """What reaches the residual stream of an update (B, T, C); source tells the layer's two updates apart."""

    def drop_hidden(self, hidden: Tensor, row_of: Tensor) -> Tensor:
        """The experts' activations (M, F) with some zeroed; row_of (A,) says where each assignment's are."""

    def within_capacity(self, routing: Routing) -> Routing:
        """The same with weight 0 for every assignment that its expert has no room for."""


class Chance(Protocol):
    """Chance in one step: something for every layer."""

    def layer(self, index: int) -> LayerChance: ...
