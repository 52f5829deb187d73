"""
tiny/score.py - what the bundled models can do: prints the tables of their card, tiny/README.md.

Run     python -m tiny.score                                 accuracy, with and without the picture; edges cut
        python -m tiny.score --model llava-tiny-anyres
Needs   eval_gqa.py, knockout.py, lens.py, harness/
"""
import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from clip_vit import MEAN
from eval_gqa import answers
from fork import clean_pass, unembed
from groups import EmptyGroup, parse_edge
from harness.errors import one_line_errors
from harness.experiment import load_model
from harness.flags import Parser
from harness.questions import BUNDLED, SIX, beside, read_gqa
from knockout import EDGES, Cut, cut_ends
from lens import lens
from tiny.world import ANSWERS, kind_of


def blank(image):
    """A picture of the same size that shows nothing."""
    return Image.new("RGB", image.size, tuple(int(255 * m) for m in MEAN))


def chance(questions):
    """The share of right answers by guessing evenly: between the two options of a question that offers them, else among
    all words that answer its kind of question."""
    return sum(0.5 if q.true_option else 1 / len(ANSWERS[kind_of(q.answer)]) for q in questions) / len(questions)


def score(model, questions):
    """-> {task: (number of questions, share answered right, share with the picture blanked, chance)}"""
    right, scores, by_picture = {}, {}, defaultdict(list)
    for q in questions:
        by_picture[q.image].append(q)
    for asked in tqdm(by_picture.values(), desc="accuracy", unit="picture", dynamic_ncols=True):
        image = asked[0].open()
        both = [answers(model, [model.prompt(q.question, shown) for q in asked]) for shown in (image, blank(image))]
        for q, *ids in zip(asked, *both, strict=True):
            right[q.key] = [q.right(model.words(answer)) for answer in ids]
    for task in sorted({q.task for q in questions}):
        of_task = [q for q in questions if q.task == task]
        seen, blanked = (sum(right[q.key][i] for q in of_task) / len(of_task) for i in (0, 1))
        scores[task] = len(of_task), seen, blanked, chance(of_task)
    return scores


def cut_everywhere(model, questions, edges):
    """Accuracy with an edge cut in all layers at once -> {edge: {task: (questions that have it, share right)}}

    By the answer's first token, which in this world is the whole answer.
    """
    right = defaultdict(lambda: defaultdict(list))
    for q in tqdm(questions, desc="cut in all layers", unit="question", dynamic_ncols=True):
        p, cuts = q.prompt(model), {}
        groups = q.groups(p)
        for edge in edges:
            try:
                cuts[edge] = [groups.positions(name) for name in parse_edge(edge)]
            except EmptyGroup:                                      # a share is over the questions that have the edge
                continue
        clean = clean_pass(model.decoder, model.embed(p), p.positions)
        everywhere = [dict.fromkeys(range(len(model.decoder.layers)))]
        ends = torch.cat(cut_ends(model.decoder, clean, [Cut(*edge, everywhere) for edge in cuts.values()]))
        for edge, token in zip(cuts, unembed(model.decoder, ends[:, 0]).argmax(-1).tolist(), strict=True):
            right[edge][q.task].append(q.right(model.words([token])))
    return {edge: {task: (len(r), sum(r) / len(r)) for task, r in sorted(right[edge].items())} for edge in edges}


def spelling(model, questions):
    """Mean probability of the answer, in lower case and capitalised, after each layer -> L + 1 pairs, embedding first.

    By the logit lens with the final norm, at the last position.
    """
    total = 0
    for q in tqdm(questions, desc="after each layer", unit="question", dynamic_ncols=True):
        p = q.prompt(model)
        stream = clean_pass(model.decoder, model.embed(p), p.positions).stream
        ids = [model.tokenizer.encode(word).ids[1] for word in (q.answer, q.answer.capitalize())]
        total = total + lens(model.decoder, stream, [-1], "final")[:, 0, ids].double()
    return (total / len(questions)).tolist()


def main(argv=None):
    with one_line_errors():
        parser = Parser(__doc__)
        parser.add_model_flags()
        parser.add_argument("--data", metavar="JSON", help="a GQA question file (the bundled one)")
        parser.add_argument("--images", metavar="DIR", help="its pictures (images/ beside it)")
        parser.add_argument("--limit", type=parser.count, metavar="N", help="the first N questions of each task")
        args = parser.parse_args(argv)
        file = Path(args.data or BUNDLED)
        questions = read_gqa(file, args.images or file.parent / "images", limit=args.limit, only=None, **beside(file))
        print_tables(load_model(parser.model(args)), questions)


def print_tables(model, questions):
    """Print the tables of the model card; before, on stderr, what there is to ask."""
    six = [q for q in questions if q.task in SIX]
    print(f"three parts, each with a bar that says how long it still takes: {len(questions):,} questions about "
          f"{len({q.image for q in questions}):,} pictures, with the picture and a blank one; {len(six):,} of them "
          f"with each of {len(EDGES)} edges cut; these once more, after each layer", file=sys.stderr)

    def table(head, rows):
        print("\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]) + "\n")
    table(("task or group", "questions", "accuracy", "picture blanked", "chance"), (
        (task, n, *(f"{100 * v:.1f} %" for v in shares)) for task, (n, *shares) in score(model, questions).items()))
    cuts = cut_everywhere(model, six, EDGES)
    tasks = sorted({q.task for q in six})
    table(("cut in all layers", *tasks), (
        (edge, *(f"{100 * by_task[t][1]:.1f} %" if t in by_task else "-" for t in tasks))
        for edge, by_task in cuts.items()))
    table(("after layer", "lower case", "capitalised"), ((i, f"{100 * low:.2f} %", f"{100 * high:.2f} %")
                                                       for i, (low, high) in enumerate(spelling(model, six))))


if __name__ == "__main__":
    main()
