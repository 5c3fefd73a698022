"""The same in a plain PyTorch loop, which stays as it was but for `attach`. Run: python examples/plain_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_topkast import Targets, TopKast

if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]

    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topkast = TopKast(
        model, targets=Targets(keep_first_dense=False), update_every=25, forward_sparsity=0.9, backward_sparsity=0.8
    )
    topkast.attach(optimizer)
    print(topkast.summary())

    for _ in range(15):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            topkast.mask_gradients()  # only because this loop clips: so that clipping sees what will be used
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    # To go on later, save all three; they load with torch.load(..., weights_only=True).
    parts = {"model": model, "optimizer": optimizer, "topkast": topkast}
    checkpoint = {name: part.state_dict() for name, part in parts.items()}

    with torch.no_grad():
        accuracy = (model(x[test]).argmax(dim=1) == y[test]).float().mean()
    print(f"accuracy {accuracy:.3f} with {float((model[2].weight != 0).float().mean()):.1%} of 2.weight in use")
