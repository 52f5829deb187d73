"""
tiny/pairs.py - pairs of pictures that differ in the colour of one thing, and questions that this colour answers.

Run     python -m tiny.pairs tiny/pairs                      writes what is bundled: clean/, other/ and their questions
Needs   tiny/world.py, pillow

Both pictures of a pair are drawn from one scene; in the other one, the thing that is asked about has the colour of the
false option. Nothing else differs by a single pixel, so whatever changes in a model's run comes from there. The
questions are a CSV as harness.questions.read_csv takes it, for patch.py.
"""
import csv
import random
import signal
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from harness.errors import one_line_errors
from harness.flags import Parser
from tiny.world import another, draw, either, scene

COLUMNS = ("question_id", "img_id", "question", "answer", "true option", "false option", "image_w", "image_h",
           "central object name", "central object x", "central object y", "central object w", "central object h")
FORMS = ("Is the {} {} or {}?", "Does the {} look {} or {}?", "What is the color of the {}, {} or {}?")


def pair(seed, number):
    """Scene `number` of the val split -> (the scene, the same with one thing recoloured, a row of COLUMNS)."""
    s, r = scene(seed, "val", number), random.Random(f"{seed}/pair/{number}")
    t = r.choice(s.things)
    wrong = another(r, "color", t.color)
    question = r.choice(FORMS).format(t.name, *either(r, t.color, wrong))
    other = replace(s, things=tuple(replace(u, color=wrong) if u is t else u for u in s.things))
    return s, other, (f"{s.id}p", s.id, question, t.color, t.color, wrong, s.width, s.height, t.name, t.x, t.y, t.w,
                      t.h)


def make(folder, n, seed=0):
    """Write n pairs: clean/ID.png, other/ID.png, pairs_ChooseAttr.csv."""
    folder = Path(folder)
    rows = []
    for number in range(n):
        *scenes, row = pair(seed, number)
        for name, s in zip(("clean", "other"), scenes, strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            draw(s).save(folder / name / f"{s.id}.png", optimize=True)
        rows.append(row)
    with open(folder / "pairs_ChooseAttr.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows((COLUMNS, *rows))


def main(argv=None):
    with one_line_errors():
        parser = Parser(__doc__)
        parser.add_argument("folder", metavar="DIR")
        parser.add_argument("--limit", type=parser.count, default=60, metavar="N", help="pairs (60)")
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the world; tiny/val has 0 (0)")
        args = parser.parse_args(argv)
        make(args.folder, args.limit, args.seed)
        print(f"wrote {args.folder}: {args.limit} pairs")


if __name__ == "__main__":
    main()
