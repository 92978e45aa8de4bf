"""Live dials: strength and frequency of each family, global and per cluster, moved while an encoder is trained, without a label.

The law, applied at every look at the held-out items:

- **Frequency follows the gap.** gap = (held-out loss − training loss) / loss at chance, both under the present dials. A gap above GAP[1] says the
  training items are being memorised: transforms come more often. A gap below GAP[0] while views of held-out items are not found again says
  that the task is too hard: they come less often. (Karras et al. 2020 move the probability of ADA by a gap in the same way.)
- **Strength follows the agreement of two views.** The share of held-out items that are nearest to their own view under one family alone: above
  AGREEMENT[1] the family asks nothing any more and is turned up, below AGREEMENT[0] it destroys what tells items apart and is turned down.
- **Effective rank has a veto.** When it falls under VETO[0] of the highest seen, the embedding is collapsing: every dial goes one step back towards
  where it began, until the rank is above VETO[1] of the highest.

Each dial moves by STEP at most, only when two looks in a row point the same way, and stays within REACH of where it began. Clusters share evidence:
their figures are drawn towards those of all items by the weight of ten items.

Nothing depends on the time: the state is in buffers, so it travels with the weights in every checkpoint, and a resumed run moves the same dials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attar.records import Dial, Policy
from attar.stages.augment.dials import OFF

STEP = 0.05
"""How far a dial moves at one look."""
REACH = (0.5, 1.5)
"""The range of a dial, as multiples of where it began (and at most 1)."""
GAP = (0.0, 0.05)
"""Gap between held-out and training loss, in shares of the loss at chance, outside of which frequency moves."""
AGREEMENT = (0.5, 0.9)
"""Agreement of an item with its view outside of which strength moves."""
VETO = (0.5, 0.7)
"""Shares of the highest effective rank seen: under the first the dials go back, until it is above the second."""
WEIGHT = 10
"""Items of all clusters that a cluster's figure is drawn towards."""
STILL = frozenset({"flip", "horizontal_flip", "vertical_flip", "quarter_turn", "grey", "channel_shuffle", "invert", "equalise"})
"""What is there or not: it has no strength to move, and half the views is the most varied it can be."""


def pair_losses(
    first: Float[Tensor, "items dim"], second: Float[Tensor, "items dim"], temperature: float
) -> tuple[Float[Tensor, " items"], float]:
    """NT-Xent of each item (objectives.nt_xent before its mean, both views averaged), and its value at chance, log(2n − 1)."""
    views = F.normalize(torch.cat([first, second]), dim=1)
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    losses = F.cross_entropy(similarity, torch.arange(len(views), device=views.device).roll(len(first)), reduction="none")
    return losses.view(2, -1).mean(0), math.log(max(2, 2 * len(first) - 1))


def found_again(items: Float[Tensor, "items dim"], views: Float[Tensor, "items dim"]) -> Float[Tensor, " items"]:
    """1 for each item whose nearest (cosine) among the views of all items is its own, else 0."""
    similarity = F.normalize(items, dim=1) @ F.normalize(views, dim=1).T
    return (similarity.argmax(1) == torch.arange(len(items), device=items.device)).float()


def by_row(values: Float[Tensor, " items"], clusters: Int[np.ndarray, " items"] | None, rows: int) -> Float[Tensor, "rows 2"]:
    """Sum and count of the values of each cluster's items, and in the last row of all items."""
    out = torch.zeros(rows, 2, dtype=torch.float64)
    pairs = torch.stack([values.detach().double().cpu(), torch.ones(len(values), dtype=torch.float64)], 1)
    if clusters is not None and rows > 1:
        out.index_add_(0, torch.as_tensor(np.asarray(clusters, np.int64)), pairs)
    out[-1] = pairs.sum(0)
    return out


def shared(sums: Float[Tensor, "rows 2"]) -> Float[Tensor, " rows"]:
    """Mean of each row drawn towards the mean of all items (the last row) by the weight of WEIGHT items; NaN when there are no items."""
    overall = sums[-1, 0] / sums[-1, 1]
    means = (sums[:, 0] + WEIGHT * overall) / (sums[:, 1] + WEIGHT)
    means[-1] = overall
    return means


def leaning(values: Float[Tensor, " rows"], band: tuple[float, float]) -> Float[Tensor, " rows"]:
    """+1 above the band, −1 below it, 0 inside (and where a figure is missing)."""
    return (values > band[1]).double() - (values < band[0]).double()


def moved(dials: Tensor, start: Tensor, lean: Tensor, before: Tensor) -> Tensor:
    """The dials a STEP further where the lean is what it was at the look before, within REACH of the start and [0, 1]."""
    step = STEP * lean * (lean == before)
    return torch.clamp(dials + step, REACH[0] * start, (REACH[1] * start).clamp_max(1.0)).where(start > 0, dials)


def returned(dials: Tensor, start: Tensor) -> Tensor:
    """The dials one STEP back towards where they began."""
    return dials + (start - dials).clamp(-STEP, STEP)


class Controller(nn.Module):
    """The dials of a policy while a network is trained under it; see the module's text for the law.

    `pinned` names the dials ("strength", "frequency") that the user set by hand and that stay. All state is in buffers.
    """

    strength: Tensor  # (rows, names): one row per cluster, the last for items of no particular cluster
    frequency: Tensor
    lean: Tensor  # (2, rows, names): where the dials leant at the look before: strength, frequency
    seen: Tensor  # (rows, 2): sum and count of training losses, in shares of chance, since the last look
    highest: Tensor  # () highest effective rank
    vetoed: Tensor  # () 1 while the veto holds
    turn: Tensor  # () whose turn it is to be measured alone

    def __init__(self, policy: Policy, pinned: Sequence[str] = ()) -> None:
        super().__init__()
        self.start_policy, self.pinned = policy, frozenset(pinned)
        self.names = tuple(policy.families)
        rows = [*policy.clusters, policy.families]
        dials = torch.tensor([[row.get(name, OFF) for name in self.names] for row in rows], dtype=torch.float64).view(len(rows), -1, 2)
        self.start = dials.unbind(-1)
        self.register_buffer("strength", self.start[0].clone())
        self.register_buffer("frequency", self.start[1].clone())
        self.register_buffer("lean", torch.zeros(2, *self.strength.shape, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(len(rows), 2, dtype=torch.float64))
        for name in ("highest", "vetoed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        on = ((dials[..., 0] > 0) & (dials[..., 1] > 0)).any(0).tolist()
        self.movable = tuple(index for index, name in enumerate(self.names) if name not in STILL and on[index])

    @property
    def live(self) -> bool:
        """Whether there is a dial to move."""
        return bool(self.movable) and not {"strength", "frequency"} <= self.pinned

    def policy(self) -> Policy:
        """The policy at the present dials."""
        rows = [
            {name: Dial(*dial) for name, dial in zip(self.names, zip(strengths, frequencies))}
            for strengths, frequencies in zip(self.strength.tolist(), self.frequency.tolist())
        ]
        start = self.start_policy
        return Policy(families=rows[-1], clusters=tuple(rows[:-1]), pick=start.pick, method=start.method, evidence=start.evidence)

    def alone(self) -> Policy:
        """One family alone, at its present strength and always: the family whose turn it is."""
        chosen = self.movable[int(self.turn) % len(self.movable)]
        rows = [
            {name: Dial(strength, 1.0) if index == chosen else OFF for index, (name, strength) in enumerate(zip(self.names, row))}
            for row in self.strength.tolist()
        ]
        return Policy(families=rows[-1], clusters=tuple(rows[:-1]))

    def saw(self, first: Tensor, second: Tensor, temperature: float, clusters: np.ndarray | None) -> None:
        """Takes note of the two views of a training batch (items, dim)."""
        losses, chance = pair_losses(first.detach(), second.detach(), temperature)
        self.seen += by_row(losses / chance, clusters, len(self.seen))

    def act(
        self,
        pair: tuple[Tensor, Tensor],
        projected: tuple[Tensor, Tensor],
        alone: tuple[Tensor, Tensor],
        temperature: float,
        rank: float,
        clusters: np.ndarray | None,
    ) -> dict[str, float]:
        """Moves the dials by what the held-out items show, and returns the signals and the dials it moved to.

        pair: embeddings of two views under the present policy; projected: the same through the projector; alone: the items as they are and under
        `alone()`; rank: effective rank; clusters: of the held-out items. Before the first training batch nothing moves.
        """
        rows = len(self.seen)
        losses, chance = pair_losses(*projected, temperature)
        gap = shared(by_row(losses / chance, clusters, rows)) - shared(self.seen)
        whole = shared(by_row(found_again(*pair), clusters, rows))
        single = shared(by_row(found_again(*alone), clusters, rows))
        self.highest.clamp_(min=rank)
        figures = {"retrieval": float(whole[-1])}
        if self.seen[-1, 1] > 0:
            figures |= {"gap": float(gap[-1])}
            self._move(gap, whole, single, rank)
        return {name: round(value, 4) for name, value in (figures | self.figures()).items()}

    def _move(self, gap: Tensor, whole: Tensor, single: Tensor, rank: float) -> None:
        limit = VETO[1] if self.vetoed else VETO[0]
        self.vetoed.fill_(float(rank < limit * float(self.highest)))
        movable, chosen = list(self.movable), self.movable[int(self.turn) % len(self.movable)]
        lean = torch.stack([self.lean[0], torch.zeros_like(self.lean[1])])
        lean[0, :, chosen] = leaning(single, AGREEMENT)
        often = leaning(gap, GAP)
        lean[1, :, movable] = torch.where((often < 0) & (whole >= AGREEMENT[0]), 0.0, often)[:, None]
        for place, (name, dials, columns) in enumerate((("strength", self.strength, [chosen]), ("frequency", self.frequency, movable))):
            if name in self.pinned or (name == "frequency" and self.start_policy.pick is not None):
                continue
            start, before = self.start[place][:, columns], self.lean[place][:, columns]
            now = dials[:, columns]
            dials[:, columns] = returned(now, start) if self.vetoed else moved(now, start, lean[place][:, columns], before)
        self.lean.copy_(lean)
        self.seen.zero_()
        self.turn += 1

    def figures(self) -> dict[str, float]:
        """Mean strength and frequency of the families that are on, and both of each family; for a training curve."""
        strengths, frequencies = self.strength[-1].tolist(), self.frequency[-1].tolist()
        if len(self.strength) > 1:  # items are drawn with their clusters' dials: those are what is shown
            strengths, frequencies = self.strength[:-1].mean(0).tolist(), self.frequency[:-1].mean(0).tolist()
        shown = [(self.names[index], strengths[index], frequencies[index]) for index in self.movable]
        mean = {"strength": np.mean([row[1] for row in shown]), "frequency": np.mean([row[2] for row in shown])}
        return (
            {key: float(value) for key, value in mean.items()}
            | {f"strength[{name}]": value for name, value, _ in shown}
            | {f"frequency[{name}]": value for name, _, value in shown}
        )

    def by_cluster(self) -> dict[str, float]:
        """Every cluster's dials, as `strength[geometry, cluster 3]`."""
        out = {}
        for row in range(len(self.strength) - 1):
            for index in self.movable:
                for dial, values in (("strength", self.strength), ("frequency", self.frequency)):
                    out[f"{dial}[{self.names[index]}, cluster {row}]"] = round(float(values[row, index]), 4)
        return out


def pins(policy: Policy) -> tuple[str, ...]:
    """The dials of a policy that were set by hand or are held."""
    return tuple(str(row["pinned"]) for row in policy.evidence if "pinned" in row)


def is_dial(name: str) -> bool:
    """Whether a column of a training curve is a dial's."""
    return name.startswith(("strength", "frequency"))
