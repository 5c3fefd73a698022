"""Drops duplicate filters of a convolution. Run: python examples/duplicate_filters.py

A trained layer has hardly any by itself, so that this one is made wider by copies of its filters, as Net2Net does
before a network trains on. The copies are dropped again: of filters that are alike only one stays, which takes over
what the others did.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_topkast import diverse_top_k


def cosines(filters: Tensor) -> Tensor:
    flat = nn.functional.normalize(filters.flatten(1))
    return flat @ flat.T


def with_filters(model: nn.Sequential, kept: Tensor, takes_over: Tensor) -> nn.Sequential:
    """Return the network with some filters of its second convolution; `takes_over`: those for each of all filters."""
    smaller = make(len(kept))
    state = model.state_dict()
    state["2.weight"], state["2.bias"] = state["2.weight"][kept], state["2.bias"][kept]
    heads = state["5.weight"]
    state["5.weight"] = torch.zeros(len(heads), len(kept)).index_add_(1, takes_over, heads)
    smaller.load_state_dict(state)
    return smaller


def make(filters: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, filters, 3, padding=1), nn.ReLU(),
        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()), nn.Linear(filters, 10),
    )  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]
    model = make(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        return float((network(x[test]).argmax(dim=1) == y[test]).float().mean())

    alike = cosines(model[2].weight.detach()).triu(1)
    print(f"as trained: {int((alike > 0.5).sum())} of {32 * 31 // 2} pairs of filters above cosine 0.5")

    # 16 filters once more, slightly changed, each with half of the outgoing weights
    state = model.state_dict()
    copied = torch.cat([torch.arange(32), torch.arange(16)])
    state["2.weight"], state["2.bias"] = state["2.weight"][copied], state["2.bias"][copied]
    state["2.weight"] += 0.02 * state["2.weight"].std() * torch.randn_like(state["2.weight"])
    state["5.weight"] = state["5.weight"][:, copied] / copied.bincount()[copied]
    wider = make(48)
    wider.load_state_dict(state)

    filters = wider[2].weight.detach()
    alike, norms = cosines(filters), filters.flatten(1).norm(dim=1)
    diverse = torch.nonzero(diverse_top_k(norms, alike > 0.95, 32)).flatten()
    largest = norms.topk(32).indices
    print(f"accuracy {accuracy(model):.3f} as trained, {accuracy(wider):.3f} with 16 filters copied")
    for name, kept in (("32 of which no two are alike", diverse), ("the 32 largest", largest)):
        smaller = with_filters(wider, kept, alike[:, kept].argmax(dim=1))
        print(f"accuracy {accuracy(smaller):.3f} with {name}")
