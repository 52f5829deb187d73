"""
explain.py - one photo, one question, one page: where the answer comes from, to look at and click through.

Run     python explain.py                                    a bundled question
        python explain.py --model llava-1.5-7b --image photo.jpg --question "Is the cup red or blue?" --options red,blue
        python explain.py --data *_ChooseAttr.csv --images photos --limit 20         a page each, and an index of them
Needs   the whole repository
Paper   https://arxiv.org/abs/2411.18620: its knockout, lens and pruning, on one question

    explain.html is one file that loads nothing from elsewhere and opens from disk. It shows the photo, the prompt's
    tokens and groups, the answer; the edges from each group to the question, the options and the last position, cut in
    a window around each layer, with random sources beside them; how much the question and the last position depend on
    each patch, by cutting, and how much they attend to it; the logit lens at every token; what pruning would save; the
    self-check. Every number is in a table, too, and in the CSVs beside the page.

Shapes  T tokens  L layers  n image tokens  B blocks of patches

Writes  explain.html, page_edges.csv, page_map.csv, page_lens.csv, page_prune.csv, page_checks.csv into --out; several
        questions: a folder each, and index.html. Besides, explain.csv (a row per page), run.json and thumbnail.json.
"""
import base64
import html
import io
import json
import math
import re
import signal
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

import check
import knockout
import lens
import maps
import prune
from harness import errors, experiment, flags, hub, runs
from knockout import windows
from views import patch_boxes, views

GROUPS = ("image", "related_patches", "other_patches", "question", "objects", "true_option", "false_option", "options",
          "instruction", "last")                   # sources of edges, where the question has them
TARGETS = ("question", "options", "last")
MAPS = ("question", "last")                        # targets of the patch maps
TEMPLATE = Path(__file__).parent / "harness" / "explain.html"


@dataclass(frozen=True)
class Settings:
    """What the flags of a run say; --help explains each."""
    shared: object                                 # harness.flags.Shared: model, questions, folder, seed
    window: int = 9
    control: int = 5
    block: int | None = None                       # patches along a side of a map's block; None: as many as are quick
    norm: str = "raw"


class Once(experiment.Asker):
    """Asks a question once, however many instruments ask it in the same way."""

    def __init__(self, model, shared):
        super().__init__(model, shared)
        self.asked = {}

    def ask(self, question, paper_spans=False, subword="first", max_norm=None, whole=False):
        how = question, paper_spans, subword, max_norm, whole
        if how not in self.asked:
            self.asked[how] = super().ask(*how)
        return self.asked[how]


# ---------------------------------------------------------------------------------------------------- measuring

def measure(model, question, s):
    """Ask a question, and run the instruments on it -> dict, what the page shows, as JSON takes it."""
    one = Once(model, replace(s.shared, data=flags.DataSettings(), strict=False))
    asked = one.ask(question, False, "first", None, whole=True)
    d, p, image = model.decoder, asked.prompt, question.open()
    edges = edges_of(one, asked, question, s)
    page = {"question": question.question, "answer": asked.answer, "expected": question.answer, "p": asked.p,
            "token": lens.spelt(model, asked.token), "L": len(d.layers), "window": s.window, "T": asked.x.shape[1],
            "tokens": [{"t": "" if span is None else p.text[span[0]:span[1]]} for span in p.spans] + [
                {"t": lens.spelt(model, i)} for i in asked.scored.ids[:-1]],        # the answer's, but its last one
            "image": [p.image.start, p.image.stop], "photo": photo_of(image),
            "views": [data_uri(view, 168) for view in views(image, p.geometry)],    # padding and tiles, as the tower's
            "boxes": [None if math.isnan(box[0]) else [round(v, 2) for v in box]
                      for box in patch_boxes(p.size, p.geometry).tolist()],
            "slots": p.slots.tolist(), "groups": {name: ranges(asked.groups.named[name]) for name in GROUPS
                                                  if name in asked.groups.named},
            "edges": edges, "maps": maps_of(d, asked, s), "lens": lens_of(model, asked, s), "norm": s.norm,
            "prune": prune_of(one, question), "checks": checks_of(d, one.ask(question), s),
            "margin": asked.base(d)["margin"]}
    page["margin"] = page["margin"] if page["margin"] is None else page["margin"].item()
    page["findings"] = findings(page)
    return page


def ranges(positions):
    """Sorted positions as a list of [first, last + 1]."""
    spans = []
    for i in positions:
        if spans and spans[-1][1] == i:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1])
    return spans


def edges_of(one, asked, question, s):
    """Every edge between groups, and its random sources -> list of dicts: source, target, change, logp, margin (L each,
    the last one None without two options), control: layers, and mean, low, high of each measure."""
    names = [name for name in GROUPS if name in asked.groups.named]
    pairs = tuple((a, b) for a in names for b in TARGETS if b in names and (a != b or a == "last")
                  and min(asked.groups.named[a]) <= max(asked.groups.named[b]))
    step = max(1, len(one.model.decoder.layers) // 8)               # about eight points of each control
    settings = knockout.Settings(one.shared, pairs, s.window, control=s.control, control_step=step)
    _, rows, _ = knockout.measure(one, question, settings)
    table = {}
    for row in (dict(zip(knockout.COLUMNS, row, strict=True)) for row in rows):
        table.setdefault(row["edge"], []).append(row)
    edges = []
    for a, b in pairs:
        mine = table.get(f"{a}->{b}")
        random = [v for name, v in table.items() if name.startswith(f"{a}->{b}, random ")]
        if mine:
            curves = [[values(row) for row in points] for points in (mine, *random)]
            edges.append({"source": a, "target": b, **by_measure(curves[0]), "p": [row["p_knockout"] for row in mine],
                          "control": control_of([row["layer"] for row in random[0]], curves[1:]) if random else None})
    return edges


def values(row):
    """The three measures of a row: change of P in percent, of log P per token, of the margin (None without one)."""
    margin = row["margin_knockout"] - row["margin_base"] if row["margin_base"] != "" else None
    return row["change_percent"], row["logp_per_token_knockout"] - row["logp_per_token_base"], margin


def by_measure(points):
    change, logp, margin = map(list, zip(*points, strict=True))
    return {"change": change, "logp": logp, "margin": None if margin[0] is None else margin}


def control_of(layers, curves):
    """Curves of random sources -> mean, lowest and highest of each measure at each layer."""
    found = {"layers": layers, "n": len(curves)}
    for i, name in enumerate(("change", "logp", "margin")):
        columns = list(zip(*([point[i] for point in curve] for curve in curves), strict=True))
        found[name] = None if columns[0][0] is None else [[sum(c) / len(c), min(c), max(c)] for c in columns]
    return found


def maps_of(d, asked, s):
    """The patches' maps -> dict: blocks, lists of image tokens; for each target attention, (L, B), and the change of
    each measure when a block is cut off in the window around each layer, (L, B), and in all layers, (B,)."""
    p, L = asked.prompt, len(d.layers)
    side = s.block or max(1, math.ceil(math.sqrt(len(p.image) * L / 4096)))         # about 4,096 cuts at most
    blocks = maps.blocks_of(p.slots, side)
    positions = [[p.image.start + i for i in block] for block in blocks]
    places = [*windows(s.window, L), dict.fromkeys(range(L))]
    found = {}
    for name in (name for name in MAPS if name in asked.groups.named):
        target = asked.groups.positions(name)
        bar = partial(tqdm, desc=f"map of {name}", unit="pass", position=0, leave=False, dynamic_ncols=True)
        change = maps.changes(d, asked, positions, target, places, bar)
        mass = [rows.mean(0) for rows in maps.attention_by_layer(d, asked.clean, target, range(L))]
        found[name] = {"attention": [[row[block].sum().item() for block in positions] for row in mass], **{
            key: v if v is None else {"layers": v[:, :L].T.tolist(), "all": v[:, L].tolist()}
            for key, v in change.items() if key != "p"}}
    return {"side": side, "blocks": blocks, "targets": found}


def lens_of(model, asked, s):
    """The likeliest word after each layer at each token: {"words": [..], "ids": (L + 1, T) indices, "p": the same}."""
    shares, ids = lens.top_words(model.decoder, asked.clean.stream, list(range(asked.x.shape[1])), 1, s.norm)
    known = {}
    cells = [[known.setdefault(lens.spelt(model, i), len(known)) for i in row] for row in ids[..., 0].tolist()]
    return {"words": list(known), "ids": cells, "p": shares[..., 0].tolist()}


def prune_of(one, question):
    """What dropping the image in the last X layers saves -> list of {X, answer, same, flops and seconds as shares}."""
    L = len(one.model.decoder.layers)
    removed = sorted({0, L // 4, L // 2, 3 * L // 4, L})
    rows, _ = prune.measure(one, question, prune.Settings(one.shared, repeats=1), removed, set())
    rows = [dict(zip(prune.COLUMNS, row, strict=True)) for row in rows]
    return [{"layers": row["removed_layers"], "answer": row["prediction"],
             "same": row["prediction"] == rows[0]["prediction"], "seconds": row["seconds"] / rows[0]["seconds"],
             "flops": row["prefill_flops"] / rows[0]["prefill_flops"]} for row in rows]


def checks_of(d, asked, s):
    """The self-check of check.py on image -> question: list of [sentence, number, held (None: only reported)]."""
    ends = map(asked.groups.positions, ("image", "question"))
    return [list(line) for line in check.selfcheck(d, asked.x, asked.positions, asked.clean, *ends, asked.token,
                                                   s.window, seed=s.shared.seed)]


# ---------------------------------------------------------------------------------------------------- in words

WORDS = {"image": "the image", "related_patches": "the patches of the annotated object", "question": "the question",
         "last": "the last position"}              # of what the sentences speak


def findings(page):
    """A careful sentence for each thing that was found, with its numbers."""
    answer, token, p = page["answer"] or page["token"], page["token"], page["p"]
    L, k, texts = page["L"], page["window"], []
    texts.append(f"The model answers “{answer}”; its first token, “{token}”, has probability {p:.3g}." + (
        " So near to 1 a cut can hardly move it: see the margin." if p > 0.99 and page["margin"] is not None else ""))
    key, unit = ("margin", "nats") if p > 0.99 and page["margin"] is not None else ("change", "%")
    for edge in page["edges"]:
        if (edge["source"], edge["target"]) not in (("image", "question"), ("related_patches", "question"),
                                                    ("image", "last"), ("question", "last")):
            continue
        l = max(range(L), key=lambda i: abs(edge[key][i]))
        where = f"the {min(k, L)} layers around {l}" if k < L else "all layers"
        text = (f"Cutting {WORDS[edge['source']]} → {WORDS[edge['target']]} in {where} takes P({token}) from {p:.3g} "
                f"to {edge['p'][l]:.3g}")
        if edge["margin"]:
            text += f" and the margin from {page['margin']:.2f} to {page['margin'] + edge['margin'][l]:.2f} nats"
        if control := edge["control"]:
            i = min(range(len(control["layers"])), key=lambda i: abs(control["layers"][i] - l))
            mean, low, high = control[key][i]
            text += (f": {edge[key][l]:+.2f} {unit}, against {mean:+.2f} ({low:+.2f} to {high:+.2f}) for "
                     f"{control['n']} random sources of the same size around layer {control['layers'][i]}")
        texts.append(text + ".")
    for name, found in page["maps"]["targets"].items():
        all_layers = found[key]["all"]
        b = max(range(len(all_layers)), key=lambda i: abs(all_layers[i]))
        mass = [sum(column) / L for column in zip(*found["attention"], strict=True)]
        rank = 1 + sum(v > mass[b] for v in mass)
        texts.append(f"Of {len(mass)} blocks of the photo, the one whose cut from {WORDS[name]} in all layers changes "
                     f"the answer most ({all_layers[b]:+.2f} {unit}) is number {rank} by attention, mean over layers.")
    kept = [row for row in page["prune"] if row["same"] and row["layers"]]
    texts.append(f"Without the image in the last {kept[-1]['layers']} of {L} layers the answer stays “{answer}”, with "
                 f"{100 * kept[-1]['flops']:.0f} % of the prefill's FLOPs." if kept else
                 f"Without the image in the last {page['prune'][1]['layers']} of {L} layers the answer is another one.")
    return texts


# ---------------------------------------------------------------------------------------------------- the page

def photo_of(image, most=640):
    """A photo, made smaller if it is large -> {"src": data URI, "width", "height": of the photo itself, px}."""
    return {"src": data_uri(image, most), "width": image.width, "height": image.height}


def data_uri(image, most):
    image = image.convert("RGB")
    image.thumbnail((most, most))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def rounded(value):
    """Floats with six digits, for a page of a readable size; the CSVs have all of them."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_page(page, file):
    """The page as one file. What stands in it is data: no text of a question can end the script or become a tag."""
    short = page["lens"] | {"p": [[round(v, 3) for v in row] for row in page["lens"]["p"]]}     # thousands of numbers
    text = json.dumps(rounded(page | {"lens": short}), ensure_ascii=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    template = TEMPLATE.read_text(encoding="utf-8")
    title = html.escape(f"{page['question']} {page['answer']}")
    runs.replace_text(file, template.replace("/*DATA*/null", text).replace("<!--TITLE-->", title))


def write_tables(page, folder, how):
    """The CSVs beside a page: every number that it shows, with all digits. An empty layer is all layers at once. how:
    what it was measured with, {column: value}."""
    measures = [m for m in ("change", "logp", "margin") if m != "margin" or page["margin"] is not None]
    edges = [("source", "target", "random", "layer", *measures, "p")]
    for e in page["edges"]:
        edge = e["source"], e["target"]
        edges += [(*edge, "", l, *(e[m][l] for m in measures), p) for l, p in enumerate(e["p"])]
        if control := e["control"]:
            edges += [(*edge, name, l, *(control[m][i][k] for m in measures), "")
                      for k, name in enumerate(("mean", "lowest", "highest")) for i, l in enumerate(control["layers"])]
    places = [page["slots"][block[0]] for block in page["maps"]["blocks"]]
    blocks = [("target", "layer", "block", "view", "row", "column", "attention", *measures)]
    for name, m in page["maps"]["targets"].items():
        blocks += [(name, l, b, *place, m["attention"][l][b], *(m[key]["layers"][l][b] for key in measures))
                   for l in range(page["L"]) for b, place in enumerate(places)]
        blocks += [(name, "", b, *place, "", *(m[key]["all"][b] for key in measures)) for b, place in enumerate(places)]
    words = [("layer", "token", "text", "word", "probability")]
    words += [(l, i, page["tokens"][i]["t"], page["lens"]["words"][word], page["lens"]["p"][l][i])
              for l, row in enumerate(page["lens"]["ids"]) for i, word in enumerate(row)]
    pruned = [("layers", "answer", "same", "flops", "seconds"),
              *((r["layers"], r["answer"], int(r["same"]), r["flops"], r["seconds"]) for r in page["prune"])]
    checks = [("what", "number", "held"),
              *((*line, "" if held is None else int(held)) for *line, held in page["checks"])]
    for name, (head, *rows) in (("edges", edges), ("map", blocks), ("lens", words), ("prune", pruned),
                                ("checks", checks)):
        runs.replace_text(folder / f"page_{name}.csv", runs.csv_text(runs.widened(head, rows, how)))


INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llava-flow: {n} questions</title><link rel="icon" href="data:,">
<style>:root {{ color-scheme: light dark }} body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 1rem auto;
max-width: 74rem; padding: 0 1rem }} ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
gap: 1rem; padding: 0; list-style: none }} img {{ width: 100%; height: 9rem; object-fit: contain }}</style></head>
<body><main><h1>{n} questions, {model}</h1><ul>
{items}
</ul></main></body></html>
"""


def write_index(pages, model, file):
    """An index of the pages: (folder, page) of each."""
    items = [f'<li><a href="{folder}/explain.html"><img src="{page["photo"]["src"]}" alt=""><br>'
             f'{html.escape(page["question"])} <strong>{html.escape(page["answer"])}</strong></a></li>'
             for folder, page in pages]
    runs.replace_text(file, INDEX.format(n=len(pages), model=html.escape(model), items="\n".join(items)))


# ---------------------------------------------------------------------------------------------------- command line

COLUMNS = ("question_id", "image", "task", "question", "answer", "prediction", "p", "page")


def main(argv=None):
    with errors.one_line_errors():
        run(parse(flags.Parser(__doc__), argv))


def run(s, load=None):
    """Make the page of every question, and an index where there are several. load: see harness.experiment.Study."""
    study = experiment.Study(s.shared, load)
    study.need_photos("explain.py shows a photo")
    study.open("explain.csv", COLUMNS, window=s.window, control=s.control, block=s.block, norm=s.norm,
               seed=s.shared.seed)
    made = {"model": s.shared.model.name, "weights": hub.weights_hash(study.checkpoint.files),
            "revision": study.checkpoint.revision or "", "dtype": study.run.settings["dtype"],
            "device": study.run.settings["device"],
            "command": " ".join(study.run.record["calls"][-1]["command"]), "date": str(date.today()),
            **{f"version of {name}": v for name, v in runs.versions().items() if name in ("python", "torch")}}
    for question in study.todo():
        with study.skipping_bad(question):
            page = measure(study.model, question, s) | {"made": made}
            folder = study.out / folder_of(question, study.single)
            folder.mkdir(parents=True, exist_ok=True)
            write_tables(page, folder, study.how)
            write_page(page, folder / "explain.html")
            short = {key: page[key] for key in ("question", "answer", "findings")} | {
                "photo": photo_of(question.open(), 260)}
            runs.replace_text(folder / "thumbnail.json", json.dumps(short))
            row = [*question.first_columns(page["answer"]), page["p"], str(folder.relative_to(study.out))]
            study.write(question, [row], right=question.right(page["answer"]))
    study.finish()
    study.print_bad()
    pages = [(folder, thumbnail(study.out / folder)) for folder in (
        folder_of(q, study.single) for q in study.questions if q.key in study.run.done)]
    if len(pages) > 1:
        write_index(pages, s.shared.model.name, study.out / "index.html")
        return print(f"wrote {study.out / 'index.html'} and a page for each of {len(pages)} questions")
    for text in pages[0][1]["findings"]:
        print(text)
    page = study.out / pages[0][0] / "explain.html"
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB), and its numbers in page_*.csv beside it")


def thumbnail(folder):
    """What an index says of a page. ValueError: its files are gone."""
    if not (folder / "thumbnail.json").is_file() or not (folder / "explain.html").is_file():
        raise ValueError(f"{folder}: a page that was finished is gone; delete the run's folder and start again")
    return json.loads((folder / "thumbnail.json").read_text(encoding="utf-8"))


def folder_of(question, single=False):
    """A question's folder, below --out: its key, as far as file systems take it. Your own question has none."""
    name = re.sub("[^A-Za-z0-9._-]+", "-", question.key).strip("-.")
    same = name == question.key.replace("/", "-", 1) and len(name) <= 80           # only the task's slash was changed
    return "" if single else name if same else f"{name[:60]}-{runs.text_hash(question.key)[:8]}"


def parse(parser, argv=None):
    """The command line -> Settings."""
    group = parser.add_argument_group("what to show")
    group.add_argument("--window", type=parser.count, metavar="K",
                       help="layers cut at once (default: 9; 3 for the bundled models, which have 10 layers)")
    group.add_argument("--control", type=int, default=5, metavar="N",
                       help="random sources beside each edge; 0: none (5)")
    group.add_argument("--block", type=parser.count, metavar="N",
                       help="maps of blocks of N x N patches (default: as small as 4,096 cuts allow)")
    group.add_argument("--norm", choices=("raw", "final"), default="raw", help="of the lens, see lens.py (raw)")
    parser.add_shared_flags("out/explain")
    args = parser.parse_args(argv)
    shared = parser.shared(args)
    parser.check_control(args.control)
    if not (args.data or args.image or args.question or args.limit or args.tasks):  # nothing was asked: one page
        shared = replace(shared, data=replace(shared.data, tasks=("ChooseAttr",), limit=1))
    return Settings(shared, args.window or parser.window(args.model), args.control, args.block, args.norm)


if __name__ == "__main__":
    main()
