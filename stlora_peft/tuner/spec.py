"""What a known backbone tells the tuner about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BackboneSpec:
    """Defaults of one backbone class, read from its class attribute ``stlora_spec``.

    A backbone that carries one can be adapted with ``STLoraConfig(num_nodes=N)`` alone.

    Args:
        target_modules: Names of the layers that are adapted unless the user names others.
        node_layout: Name suffix of a layer to the axis pattern of its input, e.g. ``{"lstm": "(b n) t c"}``.
        node_bound: Names of the modules whose tensors have one entry for each node.
        final_state: Full names of recurrent layers of which only the final hidden state is read: an adapter updates no
            other step, and the layer returns None in the place of its outputs.
        frugal: Names of the layers of a frugal adapter, where rank 1 in all of them is too much; empty means all.
        head: Names of the layers that make the forecast from the last hidden state.
        input_layout: Axis pattern of the first argument of ``forward``.
        output_layout: Axis pattern of the forecast.

    Example:
        >>> BackboneSpec(target_modules=("lstm",), node_layout={"lstm": "(b n) t c"}).output_layout
        'b t n c'
    """

    target_modules: tuple[str, ...]
    node_layout: Mapping[str, str] = field(default_factory=dict)
    node_bound: tuple[str, ...] = ()
    final_state: tuple[str, ...] = ()
    frugal: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    input_layout: str = "b t n c"
    output_layout: str = "b t n c"
