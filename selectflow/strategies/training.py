"""The training as it is at a selection: what strategies ask of model, optimizer and target set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import mul

from torch import Tensor

from selectflow.core.batches import Batch, num_examples, through
from selectflow.core.derivatives import Derivatives
from selectflow.core.examples import ExampleGradients
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.target import Cycle
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.update import Update, after_skipping

Memory = dict[str, Params]
"""Named tensors that a strategy keeps from one selection to the next."""


@dataclass(frozen=True)
class Training:
    """The model, its optimizer and the target set, read when they are asked for.

    Nothing here is written but `memory`: passes are those of a selection, in which the model is
    deterministic (dropout off, batch norm on running statistics) and put back afterwards.

    Attributes:
        seen: the pool's P candidates as they are scored.
        derivatives: of the per-example losses.
        examples: gradients of single examples.
        optimizer: of the training.
        names: parameters that scores are taken over; None: all.
        next_target: draws the next batch of the target set, as it is scored.
        target: the whole target set.
        score_view: what makes its batches into what is scored.
        memory: what strategies keep, by name; saved and restored with the selector.
    """

    seen: Batch
    derivatives: Derivatives = field(repr=False)
    examples: ExampleGradients = field(repr=False)
    optimizer: OptimizerReader = field(repr=False)
    names: tuple[str, ...] | None
    next_target: Callable[[], Batch] = field(repr=False)
    target: Cycle = field(repr=False)
    score_view: Callable[[Batch], Batch] | None = field(repr=False)
    memory: dict[str, Memory] = field(repr=False)

    # --- the target ---------------------------------------------------------------------------

    def target_gradient(self) -> Params:
        """Gradient of the mean loss of the next target batch, in the scored parameters.

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        target = self.next_target()
        with self.derivatives.objective.scoring():
            _, grad = self.derivatives.gradient(self.optimizer.values(), target, self.names)
        return grad

    def target_set(self) -> list[Batch]:
        """All batches of the target set, as they are scored.

        Raises:
            ValueError: the target has no length, so that its end is not known.
        """
        if self.target.num_batches is None:
            raise ValueError(
                "target must have a length for this strategy, got an iterable without; pass a list "
                "of batches or a DataLoader"
            )
        batches = [self.target.draw(position)[0] for position in range(self.target.num_batches)]
        return [through(self.score_view, batch) for batch in batches]

    # --- the candidates -----------------------------------------------------------------------

    def losses_at(self, params: Params, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Loss of each candidate at other values of the trained parameters, shape (P,).

        Args:
            params: values of the trained parameters.
            buffers: of the model; None: the present ones.
        """
        with self.derivatives.objective.scoring(), self._with_buffers(buffers):
            return self.derivatives.losses(params, self.seen)

    def reduced(self, function: Callable[[Params], Tensor]) -> Tensor:
        """What `function` makes of the candidates' own gradients, shape (P,).

        Args:
            function: gradients of n of them, with a leading dimension -> shape (n,).

        Raises:
            ValueError: the model is sharded, or an example alone has another loss than in a batch.
        """
        with self.derivatives.objective.scoring():
            return self.examples.reduced(function, self.optimizer.values(), self.seen, self.names)

    def products(self, direction: Params, weights: Params) -> tuple[Tensor, Tensor]:
        """Products of the candidates' weighted gradients w g: with a direction, with each other.

        Args:
            direction: of the scored parameters.
            weights: w, of the same names, each a scalar or of the parameter's shape.

        Returns:
            sum(w g * direction), shape (P,), and sum(w g_i * w g_j), shape (P, P).

        Raises:
            ValueError: as for `reduced`.
        """
        with self.derivatives.objective.scoring():
            return self.examples.products(self.optimizer.values(), self.seen, direction, weights)

    def output_errors(self) -> tuple[Tensor, Tensor]:
        """The model's output for the candidates, and the gradient of their losses in it, (P, ...).

        Raises:
            ValueError: `loss_fn` does not call the model once, or its output is no tensor.
        """
        with self.derivatives.objective.scoring():
            return self.examples.of_output(self.optimizer.values(), self.seen)

    # --- the optimizer ------------------------------------------------------------------------

    def scored(self, params: Params) -> Params:
        """The part of `params` that scores are taken over."""
        return params if self.names is None else params.pick(self.names)

    def next_update(self) -> tuple[Update, State]:
        """The optimizer's next update, and the state before it."""
        return self.optimizer.updates(1)[0], self.optimizer.state()

    def rates(self) -> Params:
        """The present learning rate of each scored parameter, shape ()."""
        update, values = self.optimizer.updates(1)[0], self.scored(self.optimizer.values())
        rates = {name: rule.lr for rule in update.rules for name in rule.names}
        return Params((name, value.new_tensor(rates[name])) for name, value in values.items())

    def trained_on(
        self, batches: Sequence[Batch], updates: Sequence[Update], state: State
    ) -> State:
        """The state after an update on each batch, in simulation.

        Args:
            batches: what each is made from.
            updates: as many.
            state: before the first; is not changed.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        with self.derivatives.objective.scoring():
            for index, batch in enumerate(batches):
                grad = self.derivatives.step_gradient(state.params, batch)
                updates = after_skipping(updates, index, grad)
                state = updates[index].advance(state, grad)
        return state

    def mean_loss(self, params: Params, batches: Sequence[Batch]) -> float:
        """Mean loss over all examples of some batches.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        sizes = list(map(num_examples, batches))
        with self.derivatives.objective.scoring():
            means = [self.derivatives.mean_loss(params, batch) for batch in batches]
        total = math.fsum(map(mul, means, sizes))
        return total / sum(sizes)

    def buffers(self) -> Params:
        """Copies of the model's buffers."""
        live = self.derivatives.objective.model.named_buffers()
        return Params((name, buffer.detach().clone()) for name, buffer in live)

    @contextmanager
    def _with_buffers(self, buffers: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Passes with other values of the buffers; within `scoring`."""
        if not buffers:
            yield
            return
        before = self.buffers()
        self.derivatives.objective.write_buffers(buffers)
        try:
            yield
        finally:
            self.derivatives.objective.write_buffers(before)


def plain_memory(memory: Mapping[str, Memory]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What strategies keep, as `torch.load` takes it back by its default."""
    return {
        name: {part: dict(params) for part, params in kept.items()} for name, kept in memory.items()
    }


def restore_memory(
    memory: dict[str, Memory], saved: Mapping[str, Mapping[str, Mapping[str, Tensor]]], like: Params
) -> None:
    """Let `memory` be what `plain_memory` saved, on the device of `like`."""
    device = next(iter(like.values())).device
    memory.clear()
    for name, kept in saved.items():
        memory[name] = {
            part: Params(params).map(lambda tensor: tensor.to(device))
            for part, params in kept.items()
        }
