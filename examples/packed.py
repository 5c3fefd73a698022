"""Packed mode: sparse in time and memory too, and compressed for inference. Run: python examples/packed.py"""

import time

import torch
from torch import nn

from lightning_topkast import Targets, TopKast, to_csr

if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.device("meta"):  # no memory yet: the weights are drawn on the host and packed before they go anywhere
        model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16))
    topkast = TopKast(
        model,
        targets=Targets(keep_first_dense=False),
        update_every=20,
        forward_sparsity=0.95,
        backward_sparsity=0.9,
        storage="packed",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # after TopKast, which changed the layers
    topkast.attach(optimizer)
    print(topkast.summary())

    teacher = torch.randn(512, 16)
    for step in range(200):
        x = torch.randn(128, 512)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1))
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    weight = topkast.weights["2.weight"]
    print(f"2.weight: {weight.parameter.numel():,} values stand for {weight.size:,} entries")

    x = torch.randn(128, 512)
    expected = model(x)
    to_csr(model)  # training is over: keep A only, in compressed form
    start = time.perf_counter()
    outputs = model(x)
    print(f"{model[2]}: inference in {1e3 * (time.perf_counter() - start):.1f} ms")
    assert torch.allclose(outputs, expected, atol=1e-4)
