"""Draws docs/assets/*.svg: the sets, a step, and a refresh as it happened. Run: python docs/tools/drawings.py"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from lightning_topkast import L2, Targets, TopKast

ASSETS = Path(__file__).parents[1] / "assets"
RESERVOIR, EXPLORING, ACTIVE = 0, 1, 2
CLASSES = ("c", "e", "a")  # of the tiers 0, 1, 2

# A browser takes the scheme from the page that holds the picture, so that they follow its switch.
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #222 } .small { font-size: 11px } .head { font-weight: 600 }
  .a { fill: #004488 } .e { fill: #e69f00 } .c { fill: #cfcfcf } .on-a { fill: #fff } .on-e, .on-c { fill: #222 }
  .line { stroke: #222; fill: none } .faint { stroke: #999; stroke-dasharray: 4 4; fill: none } .cut { stroke: #c80000; stroke-width: 1.5 }
  .pa { stroke: #004488 } .pe { stroke: #e69f00 } .pc { stroke: #9a9a9a } .path { fill: none; stroke-width: 2.5; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .a { fill: #6ea8ff } .c { fill: #555a66 } .on-a, .on-e { fill: #111 } .on-c { fill: #ddd }
    .line { stroke: #ddd } .faint { stroke: #777 } .cut { stroke: #ff7b72 } .pa { stroke: #6ea8ff } .pc { stroke: #777c88 }
  }
</style>"""  # fmt: skip  # noqa: E501


def main() -> None:
    """Write every drawing."""
    for name, drawing in {"sets": sets(), "step": step(), "refresh": refresh()}.items():
        (ASSETS / f"{name}.svg").write_text(drawing + "\n", encoding="utf-8")


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title>",
            STYLE,
            *parts,
            "</svg>",
        ]
    )


def text(x: float, y: float, words: str, *, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{css}"/>'


def legend(x: float, y: float) -> list[str]:
    parts = []
    for css, words, width in (
        ("a", "A: active", 92),
        ("e", "B\\A: exploring", 122),
        ("c", "C: reservoir", 90),
    ):
        parts += [box(x, y - 11, 13, 13, css), text(x + 19, y, words)]
        x += width + 19
    return parts


def sets() -> str:
    """A weight of 8 × 8 entries, and the same entries in the order of their magnitude."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8)
    active, updated = 13, 26  # densities of 0.2 and 0.4
    order = weight.abs().flatten().argsort(descending=True)
    tiers = torch.zeros(64, dtype=torch.int64)
    tiers[order[:updated]], tiers[order[:active]] = EXPLORING, ACTIVE
    parts = [text(20, 24, "a weight, 8 × 8 entries", css="head"), text(300, 24, "its entries by |θ|", css="head")]
    for entry, tier in enumerate(tiers.tolist()):
        row, column = divmod(entry, 8)
        parts.append(box(20 + 29 * column, 40 + 29 * row, 27, 27, CLASSES[tier]))
    base, tall = 268, 210 / weight.abs().max().item()
    for place, entry in enumerate(order.tolist()):
        height = max(1.0, weight.flatten()[entry].abs().item() * tall)
        parts.append(box(300 + 6.6 * place, base - height, 5.4, height, CLASSES[tiers[entry]]))
    for count, words in ((active, "D · n entries"), (updated, "(D + M) · n entries")):
        x = 300 + 6.6 * count - 0.6
        parts.append(f'<path d="M{x:g} {56 if count == active else 106} V{base + 8}" class="cut"/>')
        parts.append(text(x + 6, 66 if count == active else 116, words))
    return svg(740, 312, "A weight's three sets", [*parts, *legend(20, 302)])


def step() -> str:
    """What a step does to ten entries."""
    tiers = [ACTIVE, RESERVOIR, EXPLORING, RESERVOIR, ACTIVE, EXPLORING, RESERVOIR, RESERVOIR, ACTIVE, RESERVOIR]
    stored = ["0.9", "0.1", "0.5", "-0.2", "-0.8", "-0.4", "0.0", "0.2", "0.7", "-0.1"]
    rows: Sequence[tuple[str, str, list[str], bool]] = (
        ("stored: θ", "every entry has a value", stored, True),
        (
            "forward: α",
            "θ on A, zero elsewhere",
            [v if t == ACTIVE else "0" for v, t in zip(stored, tiers, strict=True)],
            False,
        ),
        ("backward: gradient", "taken at α, kept on B", ["g" if t else "" for t in tiers], False),
        ("optimizer: θ moves", "on B, from its stored value", ["↕" if t else "" for t in tiers], False),
        ("penalty: θ shrinks", "by lr·λ on A, lr·λ/D on B\\A", [("", "λ/D", "λ")[t] for t in tiers], False),
    )
    parts = []
    for number, (name, what, cells, filled) in enumerate(rows):
        y = 16 + 58 * number
        parts += [text(14, y + 18, name, css="head"), text(14, y + 35, what, css="small")]
        for place, (cell, tier) in enumerate(zip(cells, tiers, strict=True)):
            x, css = 215 + 51 * place, CLASSES[tier]
            shown = filled or cell not in ("", "0")
            parts.append(
                box(x, y, 47, 40, css)
                if shown
                else f'<rect x="{x}" y="{y}" width="47" height="40" rx="2" class="faint"/>'
            )
            parts.append(text(x + 23.5, y + 25, cell, css=f"on-{css}" if shown else "", anchor="middle"))
    return svg(740, 340, "One step of training", [*parts, *legend(215, 328)])


def refresh() -> str:
    """The entries of one weight in a real run: which set each is in, and how its magnitude moves."""
    every, steps = 20, 80
    course = run(every, steps)
    left, base, wide = 60, 262, 620
    tall = 220 / max(max(magnitudes) for magnitudes, _ in course)
    parts = [text(8, 20, "|θ|", css="head"), text(left + wide, base + 34, "optimizer step", anchor="end")]
    for moment in range(0, steps + 1, every):
        x = left + wide * moment / steps
        parts += [f'<path d="M{x:g} 36 V{base}" class="faint"/>', text(x, base + 17, str(moment), anchor="middle")]
        if 0 < moment < steps:
            parts.append(text(x, 28, "refresh", css="small", anchor="middle"))
    parts.append(f'<path d="M{left} {base} H{left + wide}" class="line"/>')
    for entry in range(len(course[0][0])):
        points = [
            f"{left + wide * m / steps:.1f} {base - tall * magnitudes[entry]:.1f}"
            for m, (magnitudes, _) in enumerate(course)
        ]
        for moment in range(0, steps, every):  # sets change at a refresh only
            css = CLASSES[course[moment][1][entry]]
            parts.append(f'<path d="M{" L".join(points[moment : moment + every + 1])}" class="path p{css}"/>')
    return svg(740, 336, "Entries of a weight over three refreshes", [*parts, *legend(left, 326)])


def run(every: int, steps: int) -> list[tuple[list[float], list[int]]]:
    """|θ| and tiers of a weight of twelve entries after 0, 1, ... steps of a linear regression."""
    torch.manual_seed(4)
    model = nn.Linear(12, 1, bias=False)
    truth = torch.tensor([1.2, -0.9, 0.7, 0.5, 0, 0, 0, 0, 0, 0, 0, 0])
    x = torch.randn(256, 12)
    y = x @ truth[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    topkast = TopKast(
        model,
        0.7,
        0.4,
        update_every=every,
        penalty=L2(shrinkage=5e-3),
        targets=Targets(keep_first_dense=False, keep_last_dense=False),
    ).attach(optimizer)
    (weight,) = topkast.weights.values()
    course = [(weight.theta().abs().flatten().tolist(), weight.tiers.flatten().tolist())]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        course.append((weight.theta().abs().flatten().tolist(), weight.tiers.flatten().tolist()))
    return course


if __name__ == "__main__":
    main()
