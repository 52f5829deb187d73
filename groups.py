"""
groups.py - token groups: names for sets of positions in a prompt, such as image, question and last.

Needs   torch, and views.py beside it. Works on any prompt with the attributes of llava_min.Prompt.
Use     p = model.prompt("Is the cup red or blue?", photo)
        g = token_groups(p, true_option="red", false_option="blue", objects=["cup"], boxes=[(20, 10, 40, 30)])
        g.positions("image"), g.positions("question - text:cup"), parse_edge("Image Central Object->Question")
Matches the groups of the paper's own code, every question of its golden runs  (tests/test_golden.py)
Paper   https://arxiv.org/abs/2411.18620, sections 4.2 and 5, appendices E and G

    image            every image token                       question      the question's own words
    base_patches     those of the whole photo                instruction   "Answer the question using ..."
    tile_patches     those of AnyRes tiles                   last          where the first answer token is predicted
    newlines         the tokens that end an AnyRes row       system        everything before the image
    related_patches  patches that show an annotated object   captions      text in place of the image
    other_patches    the other patches                       text:WORDS    these words, wherever the question has them

    true_option, false_option, options, objects      words of the question: the options of "A or B", annotated objects
    question_wo_options, question_wo_objects         the question without them
    a+b, a-b                                         union, difference

Words are whole words: "hat" is not in "What". A group that a question does not have is an error that says why.
"""
import math
import random
import re
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, groupby

from views import patches_in_boxes

NAMES = ("image", "question", "last", "true_option", "false_option", "options", "objects", "question_wo_options",
         "question_wo_objects", "related_patches", "other_patches", "captions", "system", "instruction", "newlines",
         "base_patches", "tile_patches")

# Names in the paper's code that differ from ours by more than spaces.
ALIASES = {"central object": "objects", "image central object": "related_patches",
           "image without central object": "other_patches", "image pad": "newlines",
           "image original patch": "base_patches", "image hd patch indice": "tile_patches+newlines",
           "image without central object with pad": "image-related_patches",
           "image central object in hd patch indice": "related_patches-base_patches",
           "image hd patch without central object indice": "tile_patches+newlines-related_patches",
           "question without options": "question_wo_options"}


class EmptyGroup(ValueError):
    """This question has no token of a known group. In a run over a dataset, its edge is left out for this question."""


# ---------------------------------------------------------------------------------------------------- names

# One name and the operator after it. In text:WORDS only " + " and " - " are operators: words may hold hyphens.
ATOM = re.compile(r"\s*(text:.+?(?=\s+[+-]\s|$)|[^+-]+?)\s*([+-]|$)", re.IGNORECASE)


def parse_group(text):
    """"image - related_patches" -> [("+", "image"), ("-", "related_patches")]. ValueError lists the legal names."""
    terms, at, sign = [], 0, "+"
    while at < len(text) or not terms:                              # an empty text has one term, which is refused
        m = ATOM.match(text, at)
        if not m:
            raise ValueError(f"cannot read the token group {text!r}; write name, a+b or a-b")
        # The paper's code writes "Image Central Object", we write image_central_object: both are the same name here.
        name = m[1] if m[1].lower().startswith("text:") else m[1].lower().replace("_", " ")
        if name.lower().startswith("text:"):
            terms.append((sign, "text:" + name[5:].strip()))
        elif name in ALIASES:
            inner = parse_group(ALIASES[name])                      # some of them are unions and differences of ours
            if "-" in ALIASES[name] and (terms or m[2]):            # no brackets here: x - (a - b) is not x - a - b
                raise ValueError(f"{m[1]!r} is {ALIASES[name]} and cannot be combined further")
            terms += [(sign if s == "+" else s, n) for s, n in inner]
        elif name.replace(" ", "_") in NAMES:
            terms.append((sign, name.replace(" ", "_")))
        else:
            raise ValueError(f"unknown token group {m[1]!r}; the groups are {', '.join(NAMES)}, "
                             "text:WORDS, a+b and a-b")
        at, sign = m.end(), m[2]
        if at == len(text) and sign:
            raise ValueError(f"the token group {text!r} ends in {sign!r}")
    return terms


def canonical(text):
    """The canonical name of a group: canonical("Image Central Object") == "related_patches"."""
    terms = parse_group(text)                                       # with text:WORDS, operators need spaces around them
    space = " " if any(name.startswith("text:") for _, name in terms) else ""
    return "".join(f"{space}{sign}{space}{name}" for sign, name in terms).removeprefix(f"{space}+{space}")


def parse_edge(text):
    """"Image->Question" -> ("image", "question"), the groups of an edge's keys (source) and queries (target).

    For shells, in which > is special, image:question is the same edge; so are image>question and image→question.
    """
    mark = next((mark for mark in ("->", "→", ">") if mark in text), ":" if "text:" not in text.lower() else "->")
    source, arrow, target = text.partition(mark)
    if not arrow or not source.strip() or not target.strip():
        raise ValueError(f"cannot read the edge {text!r}; write SOURCE->TARGET, as in image->question")
    return canonical(source.strip()), canonical(target.strip())


# ---------------------------------------------------------------------------------------------------- words

IRREGULAR = {"man": "men", "child": "children", "person": "people", "mouse": "mice", "foot": "feet", "tooth": "teeth",
             "goose": "geese", "he": "him", "she": "her", "they": "them"}


def forms(word):
    """A name and the other forms it takes in a question: plurals, and the object case of pronouns."""
    variants = [word, word + "s", word + "es"]
    for end, plural in {"y": "ies", "f": "ves", "fe": "ves", **IRREGULAR}.items():
        if word.endswith(end) and (end not in ("he", "she", "they") or word == end):    # not in "the"
            variants.append(word[:len(word) - len(end)] + plural)
    return variants


def occurrences(words, text):
    """Character spans [start, end) at which `words` occurs in text as whole words, in upper or lower case."""
    # Not \b, which would never match at "$5" or "C++": what counts is that no letter or digit continues the words.
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)]


def name_spans(names, text):
    """Where several names occur in one question: dict name -> character spans, or a str: why there are none.

    If the name itself is absent, its plural counts. Longer names go first and keep their words: in "Is the bed sheet on
    the bed?", "bed" is the second one.
    """
    taken, spans = [], {}
    for name in sorted(set(names), key=len, reverse=True):
        hits = next((hits for form in forms(name) if (hits := occurrences(form, text))), [])        # first form found
        free = [(a, b) for a, b in hits if not any(a < d and c < b for c, d in taken)]
        spans[name] = free or f"{name!r} is not a word of the question"
        taken += free
    return spans


def option_spans(options, text):
    """The options of an "... A or B ..." question: dict option -> a list of one span, or a str: why there is none.

    Where an option occurs twice, the one nearest to the word "or" counts; two equally near ones are refused.
    """
    ors, result = occurrences("or", text), {}
    for option, spans in name_spans(options, text).items():
        near = spans if isinstance(spans, str) else sorted(         # (characters between it and the nearest "or", span)
            (min((max(a - d, c - b) for c, d in ors), default=0), (a, b)) for a, b in spans)
        if isinstance(near, str):
            result[option] = near
        elif len(near) > 1 and near[0][0] == near[1][0]:
            result[option] = f"{option!r} occurs more than once in the question"
        else:
            result[option] = [near[0][1]]
    return result


def paper_span(p, words):
    """The released code's find_token_range: the first substring hit in the joined tokens after the image.

    -> positions, or a str: why there are none. Kept for parity; it finds "hat" in "What".
    """
    first = p.image.stop if p.image else 0                          # the template's own words come before
    pieces = [re.sub("[▁Ġ]", " ", t).replace("Ċ", "\n") for t in p.tokens[first:]]      # how vocabularies write spaces
    start = "".join(pieces).find(words)
    ends = list(accumulate(map(len, pieces)))
    hit = [first + i for i, end in enumerate(ends) if end > start and end - len(pieces[i]) < start + len(words)]
    return hit if start >= 0 else f"{words!r} is not in the question"


# ---------------------------------------------------------------------------------------------------- groups

@dataclass(frozen=True)
class Groups:
    """The token groups of one prompt. `token_groups` makes them."""
    prompt: object
    named: dict                                    # name -> sorted positions
    absent: dict                                   # name -> why this question does not have the group

    def positions(self, text, at_least=1):
        """A group's sorted positions. ValueError: there is no such group; EmptyGroup: not in this question, and why; or
        it has fewer tokens than `at_least`."""
        chosen = set()                                              # terms apply from left to right
        for sign, name in parse_group(text):
            if name.startswith("text:"):
                spans = occurrences(name[5:], self.prompt.question)
                if not spans:
                    raise EmptyGroup(f"{name}: not whole words of the question {self.prompt.question!r}")
                some = word_positions(self.prompt, spans)
            elif name not in self.named:
                raise EmptyGroup(f"{name}: {self.absent.get(name, 'this prompt has no image')}")
            else:
                some = self.named[name]
            chosen = chosen.union(some) if sign == "+" else chosen.difference(some)
        if not chosen:
            raise EmptyGroup(f"{text}: no token of this prompt is in it")
        if len(chosen) < at_least:
            raise EmptyGroup(f"{text}: it has {len(chosen)} tokens here, not the {at_least} that are asked for")
        return sorted(chosen)

    def having(self, name, positions, why="no token of this prompt is in it"):
        """A copy in which the group `name` has these positions. Without any, it is absent and `why` says so."""
        named, absent = dict(self.named), dict(self.absent)
        named.pop(name, None)
        absent.pop(name, None)
        if positions:
            named[name] = sorted(positions)
        else:
            absent[name] = why
        return replace(self, named=named, absent=absent)

    def table(self, extra=()):
        """The groups as text: name, number of tokens, positions, what they say. extra: groups besides NAMES."""
        p, lines = self.prompt, [("group", "tokens", "positions", "text")]
        for name in (*NAMES, *extra):
            try:
                positions = self.positions(name)
            except EmptyGroup as e:
                lines.append((name, "0", "-", "(" + str(e).partition(": ")[2] + ")"))
                continue
            # Neighbours make a run: their difference from a counter is constant.
            runs = [[i for _, i in run] for _, run in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])]
            places = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
            spans = [[s for s in map(p.spans.__getitem__, run) if s] for run in runs]
            words = [p.text[s[0][0]:s[-1][1]].strip(" ") for s in spans if s]
            lines.append((name, str(len(positions)), shorten(places, 44), shorten(" | ".join(words), 60)))
        wide = [max(len(line[i]) for line in lines) for i in range(3)]
        head = f"{len(p)} tokens" + (f", photo {p.size[0]}x{p.size[1]}" if p.size else "")
        rows = (f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d}".rstrip() for a, b, c, d in lines)
        return "\n".join([head, *rows])


def random_sets(pool, size, n, seed):
    """n different sets of `size` of the things in `pool` -> sorted lists, the same for the same seed. EmptyGroup: there
    are not so many."""
    pool, r = list(pool), random.Random(seed)
    there = math.comb(len(pool), size)
    if there < n:
        raise EmptyGroup(f"{len(pool)} positions hold {there} different sets of {size}, not {n}")
    if there < 4 * n:                                               # few: list them all, in random order
        return [list(some) for some in r.sample(list(combinations(pool, size)), n)]
    sets = {}
    while len(sets) < n:
        sets[tuple(sorted(r.sample(pool, size)))] = None
    return list(map(list, sets))


def shorten(text, width):
    text = repr(text)[1:-1]                                         # newlines as \n
    return text if len(text) <= width else text[:width // 2 - 2] + " .. " + text[-(width - width // 2 - 2):]


def at(p, start, end):
    """Positions of the tokens that overlap the characters [start, end) of the prompt's text."""
    return [i for i, span in enumerate(p.spans) if span and span[0] < end and start < span[1]]


def word_positions(p, spans):
    """Character spans in the question -> positions; a str, why there are none, is passed on."""
    start = p.parts["question"][0]
    return spans if isinstance(spans, str) else [i for a, b in spans for i in at(p, start + a, start + b)]


def token_groups(p, *, true_option=None, false_option=None, options=(), objects=(), boxes=(), paper_spans=False):
    """A prompt, and what is known of its question, -> Groups.

    true_option, false_option: the right and the wrong option of an "A or B" question; options: both, where it is not
    known which is right. objects: names of annotated objects; boxes: (x, y, w, h) of what they name, px of the photo.
    paper_spans: find words as the paper's code does, see `paper_span`. ValueError: a box lies outside the photo.
    """
    named, absent = {}, {}

    def put(name, *parts):
        """Record a group as the union of parts, each positions or a str that says why there are none."""
        why = next((part for part in parts if isinstance(part, str)), None)
        union = [] if why else sorted({i for part in parts for i in part})
        if union:
            named[name] = union
        else:
            absent[name] = why or "no token of this prompt is in it"

    # llava_min recorded each part's place while it built the prompt, so nothing is searched for in the tokens.
    text = {name: at(p, *span) for name, span in p.parts.items()}
    put("system", range(p.image.start) if p.image else range(text["message"][0]))
    put("captions", text.get("captions", []))
    # A token belongs to a part if they share a character: "▁Is" is the question's, though the space is not.
    put("question", paper_span(p, p.question) if paper_spans else text["question"])
    put("instruction", text["instruction"])
    put("last", [len(p) - 1])

    options = [o for o in (true_option, false_option, *options) if o]
    if paper_spans:                                                 # the paper's code looks for both in the same way
        option = word = {w: paper_span(p, w) for w in (*options, *objects)}
    else:
        option = {w: word_positions(p, spans) for w, spans in option_spans(options, p.question).items()}
        word = {w: word_positions(p, spans) for w, spans in name_spans(objects, p.question).items()}
    unknown = "the question has no options, or it is not known which is right; pass --options A,B and --answer A"
    put("true_option", option[true_option] if true_option else unknown)
    put("false_option", option[false_option] if false_option else unknown)
    # A union: if one option is not named, there is no group, rather than half of it.
    put("options", *(option[w] for w in options) if options else ["the question has no options; pass --options A,B"])
    put("objects", *(word[w] for w in objects) if objects else [
        "no object is named for this question; pass --object WORDS"])
    for part in ("options", "objects"):
        rest = set(named.get("question", ())) - set(named.get(part, ()))
        put(f"question_wo_{part}", absent.get(part) or rest)

    if p.image:
        view = p.slots[:, 0]                                        # 0 the whole photo, 1.. its tiles, -1 a newline
        put("image", p.image)
        put("base_patches", tokens_where(p, view == 0))
        put("tile_patches", tokens_where(p, view > 0) or "only AnyRes models have tiles")
        put("newlines", tokens_where(p, view < 0) or "only AnyRes models have newlines")
        related = related_patches(p, boxes) if boxes else None
        unknown = "the question has no annotated box; pass --box X,Y,W,H"
        put("related_patches",
            unknown if related is None else tokens_where(p, related) or "no patch has a pixel wholly inside a box")
        # Newlines show nothing, so they are neither related nor other patches. The paper's code leaves them out, too.
        put("other_patches", unknown if related is None else tokens_where(p, ~related & (view >= 0)))
    return Groups(p, named, absent)


def tokens_where(p, chosen):
    """A bool for each image token (n,) -> positions in the prompt."""
    return (chosen.nonzero().flatten() + p.image.start).tolist()


def related_patches(p, boxes):
    w, h = p.size
    for x, y, box_w, box_h in boxes:                                # GQA's boxes may reach over the edge a little
        if box_w < 0 or box_h < 0 or x >= w or y >= h or x + box_w < 0 or y + box_h < 0:
            raise ValueError(f"box {x},{y},{box_w},{box_h} (x,y,w,h) lies outside the {w}x{h} image")
    return patches_in_boxes(p.size, boxes, p.geometry)
