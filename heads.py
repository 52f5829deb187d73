"""
heads.py - which attention heads carry an edge: each one alone, and the most important ones together.

Needs   nothing; knockout.py cuts what this file lists.
Run     python knockout.py --edge "image->question" --per-head --measure margin
Paper   Michel et al. 2019, https://arxiv.org/abs/1905.10650, section 3, rank heads by what the loss of one changes, too

    With --per-head, an edge is cut for one head of one layer at a time; how much that changes the answer ranks the
    heads. One alone may change nothing, since others do the same. So the first ones are then cut together, beside
    random sets of as many.

A place is a dict {layer: heads that lose the edge there, None for all}, see knockout.Cut; a curve has one for each
layer.
"""
from math import comb


def alone(places, head):
    """The places of a curve, for one head alone."""
    return [dict.fromkeys(place, (head,)) for place in places]


def together(places, heads):
    """(layer, head) pairs -> one place: each head is cut in the layers of its own layer's place, all at once."""
    merged = {}
    for layer, head in heads:
        for i in places[layer]:
            merged[i] = tuple(sorted({*merged.get(i, ()), head}))
    return merged


def top_and_random(places, heads, top, draw):
    """The pairs `top` together, and ten random sets of as many -> {name: place}. heads: those that are drawn from.

    draw(things, how many, sets, what for) -> the sets, such as experiment.Asked.draw.
    """
    every = [(layer, head) for layer in range(len(places)) for head in heads]
    n, sets = min(10, comb(len(every), len(top))), {f"top {len(top)} heads": top}
    sets |= {f"{len(top)} random heads, {i}": some for i, some in enumerate(draw(every, len(top), n, "heads"), 1)}
    return {name: together(places, some) for name, some in sets.items()}
