"""Measuring routing, and expert placements for the model card."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


@dataclass
class Routing:
    loss: float                 # nats per token
    choices: np.ndarray         # [L, W, S]
    experts: int

    @property
    def load(self):
        """[L, E] tokens per expert"""
        return np.stack([np.bincount(c.ravel(), minlength=self.experts)
                         for c in self.choices])

    def pairs(self, a, b):
        return np.bincount((a * self.experts + b).ravel(),
                           minlength=self.experts ** 2
                           ).reshape(self.experts, self.experts)

    @property
    def transitions(self):
        """[L-1, E, E] same token, layer l to layer l + 1"""
        return np.stack([self.pairs(a, b) for a, b
                         in zip(self.choices[:-1], self.choices[1:])])

    @property
    def wrap(self):
        """[E, E] last layer of a token to first layer of its successor"""
        return self.pairs(self.choices[-1][:, :-1], self.choices[0][:, 1:])


@torch.no_grad()
def measure(model, windows, batch=8):
    """Loss and routing of windows [W, S + 1]."""
    total, choices = 0.0, []
    for ids in windows.split(batch):
        logits, choice, _ = model(ids[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(),
                                 reduction="sum").item()
        choices.append(choice)
    return Routing(total / windows[:, 1:].numel(),
                   torch.cat(choices, 1).numpy(), model.config.num_experts)


class History:
    """Routing counts of some checkpoints, on one fixed sample."""

    def __init__(self):
        self.rows = []

    def add(self, step, result):
        self.rows = [row for row in self.rows if row[0] != step]
        self.rows.append((step, result.transitions, result.wrap, result.load,
                          result.loss))

    def save(self, path):
        steps, transitions, wrap, load, loss = zip(*self.rows)
        np.savez_compressed(
            path, steps=np.array(steps, np.int64),
            transitions=np.array(transitions, np.uint32),
            wrap=np.array(wrap, np.uint32), load=np.array(load, np.uint32),
            loss=np.array(loss, np.float32))


# --- expert placements -----------------------------------------------------
#
# A placement is an array [L, E] of ranks; every layer puts E / R experts on
# each rank.  The stay rate is the share of transitions that keep their rank.

def stay_rate(placement, transitions, wrap=None):
    """Share of token moves from layer to layer that stay on one rank.

    With `wrap`, the move from the last layer to the first layer of the next
    token of the same window counts as well.
    """
    pairs = list(zip(placement[:-1], placement[1:], transitions))
    if wrap is not None:
        pairs.append((placement[-1], placement[0], wrap))
    stay = sum((t * (a[:, None] == b[None, :])).sum() for a, b, t in pairs)
    return stay / sum(t.sum() for _, _, t in pairs)


def round_robin(layers, experts, ranks):
    return np.tile(np.arange(experts) % ranks, (layers, 1))


def by_load(load, ranks):
    """The busiest experts of every layer together: what skew alone gives."""
    place = np.empty(load.shape, int)
    for l, row in enumerate(load):
        place[l, np.argsort(-row, kind="stable")] = \
            np.arange(len(row)) * ranks // len(row)
    return place


def assign(gain, ranks):
    """Experts to ranks in equal numbers, greatest total gain [E, R]."""
    each = len(gain) // ranks
    _, column = linear_sum_assignment(np.repeat(gain, each, axis=1), maximize=True)
    return column // each


def by_affinity(transitions, ranks, wrap=None, restarts=200, seed=1):
    """Greedy layer by layer, then re-solving single layers until none gains.

    The first layer is a random partition; the best of some restarts counts.
    With `wrap` the last layer and the first are neighbours too.
    """
    rng = np.random.default_rng(seed)
    layers, experts = len(transitions) + 1, transitions.shape[1]
    eye = np.eye(ranks)
    best, best_rate = None, -1.0
    for _ in range(restarts):
        place = np.empty((layers, experts), int)
        place[0] = rng.permutation(experts) % ranks
        for l in range(1, layers):
            place[l] = assign(transitions[l - 1].T @ eye[place[l - 1]], ranks)
        rate = stay_rate(place, transitions, wrap)
        while True:
            for l in range(layers):
                gain = np.zeros((experts, ranks))
                if l > 0:
                    gain += transitions[l - 1].T @ eye[place[l - 1]]
                elif wrap is not None:
                    gain += wrap.T @ eye[place[-1]]
                if l + 1 < layers:
                    gain += transitions[l] @ eye[place[l + 1]]
                elif wrap is not None:
                    gain += wrap @ eye[place[0]]
                place[l] = assign(gain, ranks)
            new = stay_rate(place, transitions, wrap)
            if new <= rate + 1e-12:
                break
            rate = new
        if rate > best_rate:
            best, best_rate = place.copy(), rate
    return best
