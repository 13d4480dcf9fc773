"""How a run's decisions come about: by the method for all layers, or layer by layer with a number of experts each.

Methods that leave layers with fewer experts decide for one number in all layers. Where layers differ, each is decided
by itself with the options of its number, from a view of the model that shows no other mixture.

``--budget global`` tries numbers of experts n in every layer l: the method decides for n, the layer's units are run in
memory (`rehearsal.py`), and with y(x) what the original mixture gives on the sampled inputs x, y'(x) what the tried one
does, and h(x) the original hidden state after the layer,

    cost(l, n) = mean of |y(x) - y'(x)|^2 / |h(x)|^2.

What counts is by how much the state that later layers are given is off, not by how much the mixture's own output is:
a mixture may add little to the state. (On the committed small mixture, at half the experts, costs relative to y gave
more than twice the perplexity of uniform numbers, these half of it.)
The numbers that minimise the summed costs under the same total are found exactly, by dynamic programming
(`linalg/allocation.py`). Tried are ``--experts`` plus and minus multiples of ``--budget-step``, as far as the method
and the router allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .architectures.model import Layer, Model
from .errors import InputError, MoesurgError, UsageError
from .linalg.allocation import allocate
from .methods._layers import LayerOptions, layer_counts
from .methods.base import Draft, Method
from .progress import Silent
from .rehearsal import Rehearsal
from .weights import Weights

if TYPE_CHECKING:
    from .calibration.statistics import Statistics
    from .checkpoint.reader import TensorReader
    from .plan import Plan
    from .progress import Progress, Stop
    from .sources import Source


class LayerView(Model):
    """A model of which one mixture is seen."""

    def __init__(self, model: Model, layer: Layer) -> None:
        self.__dict__.update(model.__dict__)
        self._only = layer

    @property
    def moe_layers(self) -> list[Layer]:
        return [self._only]


class Decider:
    """Asks a method, and tries what it says.

    Args:
        plan_of: the plan of a draft with other options than the run's.
    """

    def __init__(
        self,
        method: Method,
        sources: Sequence[Source],
        options: Any,
        seed: int,
        plan_of: Callable[[Draft, Any], Plan],
        progress: Progress,
        stop: Stop,
    ) -> None:
        self._method, self._sources, self._options, self._seed = method, sources, options, seed
        self._plan_of, self._progress, self._stop = plan_of, progress, stop
        self._rehearsals: dict[int, Rehearsal] = {}
        self._drafts: dict[int, Draft] = {}

    def __enter__(self) -> Decider:
        return self

    def __exit__(self, *details: object) -> None:
        for rehearsal in self._rehearsals.values():
            rehearsal.close()

    @property
    def _model(self) -> Model:
        model = self._sources[0]
        if not isinstance(model, Model):
            raise MoesurgError(f"method {self._method.name} decides on a {type(model).__name__}")
        return model

    def decide(self, statistics: Any) -> dict[str, Any]:
        """Decisions of all layers."""
        options = self._options
        if not isinstance(options, LayerOptions):
            return self._ask(self._sources[0], options, statistics)
        if options.budget == "global":
            return self._budgeted(options, statistics)
        if options.schedule is None and not options.sequential:
            return self._ask(self._model, options, statistics)
        return {
            str(layer.index): self.layer(layer, self.counts()[layer.index], statistics)
            for layer in self._model.moe_layers
        }

    def counts(self) -> dict[int, int]:
        """Experts by layer."""
        layers = [layer.index for layer in self._model.moe_layers]
        return layer_counts(self._model, self._options) or dict.fromkeys(
            layers, self._options.experts
        )

    def layer(self, layer: Layer, count: int, statistics: Any) -> Any:
        """The decision of one layer that keeps ``count`` experts."""
        view, options = LayerView(self._model, layer), self._options.uniform(count)
        # One of many layers and numbers: the stage that shows is that of all of them.
        return self._ask(view, options, statistics, Silent())[str(layer.index)]

    @property
    def sequential(self) -> bool:
        """Whether statistics are taken behind the layers already operated on."""
        return isinstance(self._options, LayerOptions) and self._options.sequential

    def operate(self, layer: Layer, statistics: Statistics) -> tuple[Model, TensorReader]:
        """Decide on a layer and make it; see :meth:`try_layer`."""
        self._stop.check()
        count = self.counts()[layer.index]
        return self.try_layer(layer, count, self.layer(layer, count, statistics), statistics)

    def settle(self, decisions: dict[str, Any]) -> Draft | None:
        """Another draft, where decisions tell what the output holds."""
        options = self._options
        if isinstance(options, LayerOptions) and options.budget == "global":
            counts = {int(index): found["experts"] for index, found in decisions.items()}
            return self._method.plan(self._sources, options.counted(counts))
        if self._method.settle is None:
            return None
        models: Any = self._sources
        return self._method.settle(models, options, decisions)

    def try_layer(
        self, layer: Layer, count: int, decision: Any, statistics: Any
    ) -> tuple[Model, TensorReader]:
        """The output's model and a reader in which the layer is operated on, until another one is tried."""
        if count not in self._rehearsals:
            draft, options = self._draft(count), self._options.uniform(count)
            self._rehearsals[count] = Rehearsal(self._plan_of(draft, options), self._sources, draft)
        rehearsal = self._rehearsals[count]
        return rehearsal.model, rehearsal.layer(layer.index, decision, statistics)

    def _draft(self, count: int) -> Draft:
        """The plan of ``count`` experts in every layer, made once."""
        if count not in self._drafts:
            options = self._options.uniform(count)
            self._drafts[count] = self._method.plan(self._sources, options)
        return self._drafts[count]

    def _ask(
        self, model: Any, options: Any, statistics: Any, progress: Progress | None = None
    ) -> dict[str, Any]:
        method = self._method
        if method.decide_from_weights is not None:
            with Weights(self._sources, progress or self._progress, self._stop) as weights:
                return method.decide_from_weights(model, options, statistics, weights, self._seed)
        if method.decide is None:
            raise MoesurgError(f"method {method.name} decides nothing")
        return method.decide(model, options, statistics, self._seed)

    def _budgeted(self, options: LayerOptions, statistics: Statistics) -> dict[str, Any]:
        layers = self._model.moe_layers
        tried = self._tried(options)
        self._progress.stage("trying numbers of experts", len(layers) * len(tried))
        costs: dict[int, dict[int, float]] = {}
        decisions: dict[int, dict[int, Any]] = {}
        for layer in layers:
            here = {count: self.layer(layer, count, statistics) for count in tried}
            costs[layer.index] = self._costs(layer, here, statistics)
            decisions[layer.index] = here
        chosen = allocate(costs, options.experts * len(layers))
        return {
            str(index): {
                **decisions[index][count],
                "experts": count,
                "costs": {str(number): cost for number, cost in costs[index].items()},
            }
            for index, count in chosen.items()
        }

    def _tried(self, options: LayerOptions) -> list[int]:
        """Numbers of experts that the method and the router allow, ascending.

        Raises:
            UsageError: no other than the one asked for.
        """
        model = self._model
        step = options.budget_step or max(1, model.experts // 16)
        found = []
        for count in range(options.experts % step or step, model.experts + 1, step):
            try:
                self._draft(count)
            except InputError:
                continue
            found.append(count)
        if len(found) < 2:
            raise UsageError(
                f"--budget global: only {', '.join(map(str, found)) or 'no number'} of experts can be tried "
                f"with --budget-step {step}",
                hint="choose a smaller --budget-step",
            )
        return found

    def _costs(
        self, layer: Layer, decisions: dict[int, Any], statistics: Statistics
    ) -> dict[int, float]:
        """The cost of every number of experts in a layer, each with its decision."""
        import torch

        from .methods.experts._function import mixture_output

        inputs_ND, _ = statistics.inputs(layer.index)
        rows_ND = torch.from_numpy(inputs_ND.copy())
        energy_N = torch.from_numpy(statistics.energies(layer.index).copy()).clamp_min(1e-300)
        found: dict[int, float] = {}
        with Weights(self._sources, self._progress, self._stop) as weights:
            wanted_ND = mixture_output(weights, self._model, layer, rows_ND)
            for count, decision in decisions.items():
                self._stop.check()
                model, reader = self.try_layer(layer, count, decision, statistics)
                tried_ND = mixture_output(reader, model, model.layers[layer.index], rows_ND)
                lost_N = (tried_ND - wanted_ND).square().sum(1)
                found[count] = float((lost_N / energy_N).mean())
                self._progress.advance()
        return found
