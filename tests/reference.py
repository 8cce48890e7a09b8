"""Slow, obvious versions of what selectflow computes fast: loops over examples and real reruns."""

from __future__ import annotations

import copy

import torch


def example(batch, index):
    """A batch of the one example at `index`."""
    return {
        key: value[index : index + 1] if isinstance(value, torch.Tensor | list) else value
        for key, value in batch.items()
    }


def count(batch):
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))


def per_example_gradients(model, loss_fn, batch):
    """One dict of gradients an example, each by a backward pass of its own."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for index in range(count(batch)):
        loss = loss_fn(model, example(batch, index)).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(named.items(), grads, strict=True)
            }
        )
    return gradients


def inner(first, second):
    return sum(float((first[name] * second[name]).sum()) for name in second)


def slopes(model, loss_fn, batch, direction):
    """Derivative of each example's loss along `direction`."""
    gradients = per_example_gradients(model, loss_fn, batch)
    return torch.tensor([inner(g, direction) for g in gradients], dtype=torch.float64)


def clone(model, optimizer):
    """Independent copies that go on exactly as the originals would."""
    model_copy = copy.deepcopy(model)
    twins = dict(zip(model.parameters(), model_copy.parameters(), strict=True))
    groups = [
        {**group, "params": [twins[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    optimizer_copy = type(optimizer)(groups)
    optimizer_copy.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model_copy, optimizer_copy


def rerun(
    model,
    optimizer,
    loss_fn,
    batches,
    target,
    *,
    lrs=None,
    max_grad_norm=None,
    weights=(),
    reduce=torch.mean,
):
    """Target loss after really training copies on `batches` with `torch.optim`.

    lrs: learning rate of each step, else the optimizer's. weights: (step, example, extra) adds
    `extra` to the example's weight 1/B. reduce: of the target's per-example losses.
    """
    model, optimizer = clone(model, optimizer)
    for step, batch in enumerate(batches):
        if lrs is not None:
            for group in optimizer.param_groups:
                group["lr"] = lrs[step]
        losses = loss_fn(model, batch)
        weight = torch.full_like(losses, 1 / len(losses))
        for at, index, extra in weights:
            if at == step:
                weight[index] += extra
        optimizer.zero_grad()
        (losses * weight).sum().backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    with torch.no_grad():
        found = reduce(loss_fn(model, target))
        return found.item() if found.ndim == 0 else found


def removal(step, position, size, share=1.0):
    """Weights that take `share` of one example out of a batch and give it to the others."""
    return [
        (step, index, share * (-1 / size if index == position else 1 / (size - 1) - 1 / size))
        for index in range(size)
    ]


def weight_derivative(model, optimizer, loss_fn, batches, target, step, index, delta=1e-4, **how):
    """Central difference of the target loss in one example's weight, by two real reruns."""
    ends = [
        rerun(
            model, optimizer, loss_fn, batches, target, weights=[(step, index, sign * delta)], **how
        )
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * delta)


def adamw_rollout(model, optimizer, loss_fn, batches, weights, target, lr_share=0.0, clip=None):
    """The function alpha -> target loss after AdamW updates, line by line as torch documents it.

    weights: one (w0, dw) for each batch; the loss of update n is sum((w0 + alpha dw) * losses).
    lr_share: the learning rate is (1 + alpha lr_share) lr. clip: gradients are clipped by norm.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def moment(p, key):
        return optimizer.state[p][key].clone() if p in optimizer.state else torch.zeros_like(p)

    def run(alpha):
        params = {name: p.detach().clone() for name, p in named.items()}
        exp_avg = {name: moment(p, "exp_avg") for name, p in named.items()}
        exp_avg_sq = {name: moment(p, "exp_avg_sq") for name, p in named.items()}
        num = {name: int(optimizer.state.get(p, {}).get("step", 0)) for name, p in named.items()}
        for batch, (w0, dw) in zip(batches, weights, strict=True):

            def loss(at, batch=batch, w0=w0, dw=dw):
                return ((w0 + alpha * dw) * _losses(model, loss_fn, at, batch)).sum()

            grads = torch.func.grad(loss)(params)
            if clip is not None:
                norm = sum(g.square().sum() for g in grads.values()).sqrt()
                factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
                grads = {name: factor * g for name, g in grads.items()}
            for name, g in grads.items():
                group, n = groups[id(named[name])], num[name] + 1
                (beta1, beta2), lr = group["betas"], (1 + alpha * lr_share) * group["lr"]
                m = beta1 * exp_avg[name] + (1 - beta1) * g
                v = beta2 * exp_avg_sq[name] + (1 - beta2) * g * g
                denominator = (v / (1 - beta2**n)).sqrt() + group["eps"]
                theta = params[name] * (1 - lr * group["weight_decay"])
                params[name] = theta - lr * (m / (1 - beta1**n)) / denominator
                exp_avg[name], exp_avg_sq[name], num[name] = m, v, n
        return _losses(model, loss_fn, params, target).mean()

    return run


def first_and_second(function):
    """I = f'(0) and Q = f''(0) / 2 of a function of one number, by two nested jvps."""
    zero, one = torch.zeros(()).double(), torch.ones(()).double()

    def slope(alpha):
        return torch.func.jvp(function, (alpha,), (one,))[1]

    first, bend = torch.func.jvp(slope, (zero,), (one,))
    return first.item(), bend.item() / 2


def _losses(model, loss_fn, params, batch):
    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss_fn(self.model, batch)

    given = {f"model.{name}": p for name, p in params.items()}
    return torch.func.functional_call(Call(), given, (batch,))


def adam_direction(model, optimizer, gradient):
    """What Adam would move by, over lr and without decoupled decay, had it this gradient."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, p in model.named_parameters():
        if name not in gradient:
            continue
        group, state = groups[id(p)], optimizer.state[p]
        (beta1, beta2), number = group["betas"], int(state["step"]) + 1
        g = gradient[name]
        if not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
            g = g + group["weight_decay"] * p.detach()
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        root = (v / (1 - beta2**number)).sqrt() + group["eps"]
        found[name] = m / (1 - beta1**number) / root
    return found


def adam_step_matrix(model, optimizer, gradient):
    """P g: the part of Adam's next step that `gradient` makes, its second moments as they are."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, p in model.named_parameters():
        group, state = groups[id(p)], optimizer.state[p]
        (beta1, beta2), done = group["betas"], int(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt() + group["eps"]
        rate = group["lr"] * (1 - beta1) / (1 - beta1 ** (done + 1))
        # of what has had no gradient there is no second moment, and no step is foreseen
        found[name] = torch.where(state["exp_avg_sq"] > 0, rate * gradient[name] / root, 0.0)
    return found


def greedy_order(scores, penalty):
    """Positions as picked: each pick j takes penalty(i, j) off the score of every other i."""
    scores, left, order = [float(score) for score in scores], list(range(len(scores))), []
    while left:
        pick = max(left, key=lambda i: scores[i])
        left.remove(pick)
        order.append(pick)
        for i in left:
            scores[i] -= penalty(i, pick)
    return order
